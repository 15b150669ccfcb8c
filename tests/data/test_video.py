"""Videos become a few frames that know when they were shown; the same file gives the same bytes."""

import csv
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from bridgework.data.dataset import open_dataset, verify
from bridgework.data.importers import video
from bridgework.data.importers.video import shots
from bridgework.data.quarantine import BadSample, Reason, records
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError

RATE = 12  # frames a second; frame k is grey, 5 x k, below a white bar
CODECS = {
    "mp4": "libx264",
    "mov": "libx264",
    "mkv": "libx264",
    "webm": "libvpx",
    "avi": "mpeg4",
    "gif": "gif",
}


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """A video of `frames` frames, in memory once made."""
    made = dict[tuple[Any, ...], bytes]()

    def make(
        kind: str,
        frames: int = 24,
        *,
        side: int = 32,
        turn: int = 0,
        fast: bool = False,
        **codec: str,
    ) -> bytes:
        key = (kind, frames, side, turn, fast, *codec.items())
        if key not in made:
            path = tmp_path_factory.mktemp("films") / f"x.{kind}"
            with av.open(str(path), "w", options={"movflags": "faststart"} if fast else {}) as file:
                stream = file.add_stream(CODECS[kind], rate=RATE, options=codec)
                stream.width = stream.height = side
                stream.pix_fmt = "rgb8" if kind == "gif" else "yuv420p"
                if turn:
                    stream.set_display_rotation(turn)
                for number in range(frames):
                    pixels = np.full((side, side, 3), min(5 * number, 255), np.uint8)
                    pixels[: side // 4] = 255
                    for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                        file.mux(packet)
                for packet in stream.encode():
                    file.mux(packet)
            made[key] = path.read_bytes()
        return made[key]

    return make


def frame(jpeg: bytes) -> float:
    """Which frame a JPEG shows, by its grey."""
    assert jpeg.startswith(b"\xff\xd8\xff")
    return float(np.asarray(Image.open(io.BytesIO(jpeg)).convert("L"))[16:].mean()) / 5


def cut(data: bytes, **how: Any) -> list[tuple[float, bytes]]:
    return shots(data, **({"frames": 8, "fps": None, "max_s": 600.0} | how))


def read(folder: Path, **how: Any) -> dict[str, Sample]:
    video.VideoImporter(max_bad=1, **how).run(str(folder), f"{folder}-made", say=lambda _: None)
    assert verify(f"{folder}-made") == []
    return {sample.key: sample for sample in open_dataset(f"{folder}-made").samples()}


def aside(folder: Path) -> dict[str, Reason]:
    return {record.key: record.reason for record in records(f"{folder}-made.quarantine")}


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "avi"])
def test_frames_are_spread_evenly_or_taken_at_a_rate(kind: str, film: Callable[..., bytes]) -> None:
    data = film(kind)  # 2 s
    spread, rated = cut(data, frames=4), cut(data, frames=8, fps=1.0)
    assert [time for time, _ in spread] == pytest.approx([0.25, 0.75, 1.25, 1.75], abs=2e-3)
    assert [frame(jpeg) for _, jpeg in spread] == pytest.approx(
        [3, 9, 15, 21], abs=1.2 if kind == "avi" else 0.8
    )
    assert [time for time, _ in rated] == pytest.approx([0, 1], abs=2e-3)
    assert [frame(jpeg) for _, jpeg in rated] == pytest.approx([0, 12], abs=0.8)
    assert (
        len(cut(data, frames=1)) == 1 and len(cut(data, frames=5, fps=100.0)) == 1
    )  # no frame is taken twice


def test_what_was_shown_is_the_last_frame_before(film: Callable[..., bytes]) -> None:
    found = cut(film("mp4"), frames=60, fps=30.0)
    with av.open(io.BytesIO(film("mp4"))) as file:
        times = [one.time for one in file.decode(video=0)]
    expected = sorted({max(time for time in times if time <= i / 30 + 1e-3) for i in range(60)})
    assert [time for time, _ in found] == pytest.approx(expected) and len(found) == 24


def test_the_same_file_gives_the_same_bytes(film: Callable[..., bytes]) -> None:
    assert cut(film("mp4")) == cut(film("mp4"))
    assert cut(film("mp4"), frames=64) != cut(film("mp4"), frames=8)


def test_a_video_that_does_not_begin_at_0_has_times_that_do(film: Callable[..., bytes]) -> None:
    found = cut(film("avi", bf="2"), frames=4)  # its first frame has the time 1/12
    assert [time for time, _ in found] == pytest.approx([0.25, 0.75, 1.25, 1.75], abs=2e-3)


@pytest.mark.parametrize(
    ("turn", "bar"), [(90, (slice(None), 0)), (180, (-1, slice(None))), (-90, (slice(None), -1))]
)
def test_frames_are_upright(turn: int, bar: Any, film: Callable[..., bytes]) -> None:
    ((_, jpeg),) = cut(film("mp4", 2, turn=turn), frames=1)
    assert np.asarray(Image.open(io.BytesIO(jpeg)).convert("L"))[bar].min() > 240


def test_a_gif_is_a_video_on_white(tmp_path: Path) -> None:
    layers = [Image.new("RGBA", (32, 32), (200, 0, 0, 255 * (n % 2))) for n in range(4)]
    layers[0].save(
        tmp_path / "x.gif", save_all=True, append_images=layers[1:], duration=500, disposal=2
    )
    found = cut((tmp_path / "x.gif").read_bytes(), frames=4)
    assert [time for time, _ in found] == pytest.approx([0, 0.5, 1, 1.5])
    means = [np.asarray(Image.open(io.BytesIO(jpeg))).mean((0, 1)) for _, jpeg in found]
    assert means[0] == pytest.approx([255] * 3, abs=3) and means[1] == pytest.approx(
        [200, 0, 0], abs=8
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY_FILE),
        (b"<html>not found</html>", Reason.NOT_AN_IMAGE),
        (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n",
            Reason.NOT_AN_IMAGE,
        ),
        (b"ffconcat version 1.0\nfile x.mp4\n", Reason.NOT_AN_IMAGE),
        (b"\0\0\0\x18ftypisom" + bytes(100), Reason.CORRUPT),
        (b"\x1aE\xdf\xa3" + bytes(100), Reason.CORRUPT),
        (b"GIF89a\1\0\1\0\0\0\0;", Reason.CORRUPT),
    ],
)
def test_what_is_no_video_is_told_by_its_first_bytes(data: bytes, reason: Reason) -> None:
    with pytest.raises(BadSample) as caught:
        cut(data)
    assert caught.value.reason is reason


def test_a_file_that_is_cut_is_never_read_as_a_shorter_one(film: Callable[..., bytes]) -> None:
    for kind, fast in (
        ("mp4", True),
        ("mp4", False),
        ("mkv", False),
        ("webm", False),
        ("avi", False),
        ("gif", False),
    ):
        data = film(kind, fast=fast)
        for share in (0.02, 0.3, 0.5, 0.7, 0.9, 0.99):
            with pytest.raises(BadSample) as caught:
                cut(data[: int(share * len(data))])
            assert caught.value.reason in (Reason.TRUNCATED, Reason.CORRUPT), (kind, share)


TAILS = (bytes(16), bytes(4096), b"recovered by tool v1.2 " * 3, b"TAG" + bytes(125), b"\n", b"ab")


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "avi", "gif"])
def test_bytes_after_the_end_of_a_video_are_no_part_of_it(
    kind: str, film: Callable[..., bytes]
) -> None:
    whole = film(kind)
    given: Any = {"frames": 3, "fps": None, "max_s": 60}
    for tail in TAILS:
        assert shots(whole + tail, **given) == shots(whole, **given)


@pytest.mark.parametrize("brand", ["with a brand", "without one"])
def test_quicktime_is_read_under_its_own_endings(
    brand: str, film: Callable[..., bytes], tmp_path: Path
) -> None:
    whole = film("mov")
    size = int.from_bytes(whole[:4])
    if brand == "without one":  # as before 2001: `ftyp` becomes `skip`, so that no offset moves
        whole = whole[:4] + b"skip" + whole[8:size] + whole[size:]
    source = tmp_path / "src"
    source.mkdir()
    for name in ("IMG_0001.MOV", "b.mov", "c.qt", "d.3gp"):
        (source / name).write_bytes(whole)
        (source / name).with_suffix(".txt").write_text("a clip")
    assert len(read(source, frames=2)) == 4


def test_videos_that_are_not_read_are_counted(film: Callable[..., bytes], tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for name in ("a.mp4", "b.wmv", "c.flv", "d.MPG", "e.ts", "._a.mp4", "a.jpg"):
        (source / name).write_bytes(film("mp4"))
        (source / name).with_suffix(".txt").write_text("a clip")
    assert list(read(source, frames=2)) == ["a.mp4"]
    left = open_dataset(f"{source}-made").manifest.left_out
    assert {k: v for k, v in left.items() if k.startswith("files")} == {
        "files of .flv": 1,
        "files of .jpg": 1,
        "files of .mpg": 1,
        "files of .ts": 1,
        "files of .wmv": 1,
    }


def test_too_long_and_too_large_videos_are_refused_before_a_frame_is_decoded(
    film: Callable[..., bytes],
) -> None:
    for data, how, reason in (
        (film("mp4"), {"max_s": 1.9}, Reason.BAD_ROW),
        (film("mp4", 1, side=2976, preset="ultrafast"), {}, Reason.TOO_MANY_PIXELS),
    ):
        with pytest.raises(BadSample) as caught:
            cut(data, **how)
        assert caught.value.reason is reason
    assert len(cut(film("mp4"), max_s=2.1)) == 8


@pytest.mark.parametrize("size", [(65_504, 8), (8, 65_504)])
def test_a_frame_longer_than_any_jpeg_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("P", size).save(tmp_path / "x.gif")
    with pytest.raises(BadSample, match="at most 65500 a side") as caught:
        cut((tmp_path / "x.gif").read_bytes())
    assert caught.value.reason is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("kind", CODECS)
def test_noise_in_a_file_is_a_bad_sample_or_none(kind: str, film: Callable[..., bytes]) -> None:
    for seed in range(60):
        draw = np.random.default_rng(seed)
        data = np.frombuffer(film(kind), np.uint8).copy()
        data[draw.integers(4, len(data), 1 + seed % 20)] = draw.integers(0, 256, 1 + seed % 20)
        with suppress(BadSample):
            assert 1 <= len(cut(data.tobytes(), frames=2)) <= 2


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_text_file_beside_a_video_is_its_caption(
    film: Callable[..., bytes], tmp_path: Path
) -> None:
    source = tmp_path / "src"
    (source / "deep").mkdir(parents=True)
    for name in ("a.mp4", "b.webm", "deep/c.GIF", "d.mp4", "e.mp4"):
        (source / name).write_bytes(film(name.rsplit(".", 1)[1].lower()))
    (source / "d.mp4").write_bytes(b"")
    for name, text in {"a": "a bar\n", "deep/c": "a gif", "d": "nothing", "e": "\xff"}.items():
        (source / f"{name}.txt").write_bytes(text.encode("latin-1"))
    found = read(source, frames=2)
    assert list(found) == ["a.mp4", "deep/c.GIF"]
    assert found["a.mp4"].parts == (
        Part("caption", image=0), Part("caption", image=1), Part("caption", text="a bar"),
    )  # fmt: skip
    assert found["a.mp4"].times_s == pytest.approx((0.5, 1.5)) and len(found["a.mp4"].images) == 2
    assert aside(source) == {
        "b.webm": Reason.EMPTY_TEXT,
        "d.mp4": Reason.EMPTY_FILE,
        "e.mp4": Reason.BAD_ROW,
    }


@pytest.mark.parametrize("table", ["rows.csv", "rows.jsonl"])
def test_a_table_names_videos_and_captions(
    table: str, film: Callable[..., bytes], tmp_path: Path
) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "a.mp4").write_bytes(film("mp4"))
    (tmp_path / "a.mp4").write_bytes(film("mp4"))
    (source / "x.mp4").write_bytes(b"<html>")
    rows = [
        ("a.mp4", "a bar"),
        ("a.mp4", "a strip"),
        ("a.mp4", "a bar"),
        ("../a.mp4", "x"),
        ("x.mp4", "x"),
        ("", "x"),
    ]
    with (source / table).open("w", newline="") as file:
        if table.endswith("csv"):
            csv.writer(file).writerows([("file", "said"), *rows])
        else:
            file.writelines(json.dumps({"file": name, "said": text}) + "\n" for name, text in rows)
    found = read(source, table=table, video="file", text="said", frames=8, fps=1.0)
    assert {key: sample.text for key, sample in found.items()} == {
        "a.mp4": "a bar",
        "a.mp4#2": "a strip",
    }
    assert found["a.mp4"].times_s == pytest.approx((0, 1))
    assert list(aside(source).values()) == [
        Reason.OUTSIDE, Reason.NOT_AN_IMAGE, Reason.BAD_ROW,
    ]  # fmt: skip


def test_a_table_of_wrong_columns_is_an_error_and_a_line_of_too_many_fields_a_bad_row(
    film: Callable[..., bytes], tmp_path: Path
) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "a.mp4").write_bytes(film("mp4"))
    (source / "a.txt").write_text("a bar")
    (source / "t.csv").write_text("video,caption\na.mp4,a bar, and more\na.mp4,a bar\n")
    with pytest.raises(
        DataError, match=r"video='vidoe' names no column of t\.csv; did you mean 'video'\?"
    ):
        read(source, table="t.csv", video="vidoe", frames=1)
    with pytest.raises(DataError, match=r"the table a\.txt is none of \.csv"):
        read(source, table="a.txt", frames=1)
    assert {key: sample.text for key, sample in read(source, table="t.csv", frames=1).items()} == {
        "a.mp4": "a bar"
    }
    (bad,) = records(f"{source}-made.quarantine")
    assert bad.reason is Reason.BAD_ROW and "3 fields, and the header names 2 columns" in bad.detail


def test_whatever_stands_in_a_row_it_goes_one_way_or_the_other(
    film: Callable[..., bytes], tmp_path: Path
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.mp4").write_bytes(film("mp4"))
    wrong = [None, True, 1.5, "", [], [1], {}, float("nan"), "\ud800", "a\0.mp4"]
    rows = (
        [{"video": "a.mp4", "caption": value} for value in wrong]
        + [{"video": value} for value in wrong]
        + wrong
    )
    lines = [json.dumps(row) for row in [{"video": "a.mp4", "caption": "good"}, *rows]]
    (tmp_path / "src" / "t.jsonl").write_text("\n".join([*lines, "{"]))
    assert "a.mp4" in read(tmp_path / "src", table="t.jsonl", frames=1)
    manifest = open_dataset(f"{tmp_path}/src-made").manifest
    assert manifest.rows + sum(manifest.quarantined.values()) == 2 + len(rows)


@pytest.mark.parametrize(
    "how", [{"frames": 0}, {"frames": 65}, {"fps": 0.0}, {"fps": float("inf")}, {"max_s": -1.0}]
)
def test_a_cut_that_cannot_be_made_is_refused(how: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 to 64 frames"):
        video.VideoImporter(**how).run(str(tmp_path), str(tmp_path / "made"))
