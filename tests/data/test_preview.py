"""Previews show the pixels, text and loss of training, compared with the rows of the reader."""

import base64
import io
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bridgework.data.dataset import write
from bridgework.data.preview import Preview, Span, page, read, stored, terminal
from bridgework.data.reader import ReaderConfig, Row, local
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.data.templates import TEMPLATES
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import DataError
from bridgework.system import END, IGNORE, IMAGE, Source, Stage, load

MADE: dict[str, Any] = {"source": "test", "license": "CC0-1.0", "made_by": "tests"}
BYTES = load_tokenizer("bytes")
TINY = load("llava").tiny()["align"]
PICTURE = next(shapes(rows=1, size=24)).images[0]
HOSTILE = "<script>alert('x')</script> & [bold]no markup[/] \"quoted\""


def made(folder: Path, samples: Iterable[Sample], template: str = "plain") -> Stage:
    """Return the align stage with `samples` and `template`."""
    write(samples, str(folder / "made"), **MADE, group_rows=4)
    data = replace(
        TINY.data, sources=(Source(name="it", dataset=str(folder / "made")),), template=template
    )
    return replace(TINY, data=data)


def told(shown: Preview, kind: str) -> str:
    return "".join(span.text for span in shown.spans if span.kind == kind)


def reads(stage: Stage, home: Path, n: int) -> dict[str, Row]:
    """Return the first `n` rows of training by key."""
    feed = replace(
        ReaderConfig.of(stage, home),
        batch=n,
        steps=1,
        mixture=replace(stage.data, lanes=1, window=1),
    )
    [rows] = local(feed, rank=0, world=1, start=0)
    return {row.key: row for row in rows}


@pytest.mark.parametrize("template", TEMPLATES)
def test_preview_matches_the_rows_of_the_reader(tmp_path: Path, home: Path, template: str) -> None:
    stage = made(tmp_path, shapes(rows=8, size=48), template)
    rows = reads(stage, home, 8)
    for shown in read(stage, home, 8):
        row = rows.pop(shown.key)
        np.testing.assert_array_equal(np.stack(shown.images), row.images)
        assert told(shown, "loss") == BYTES.decode([label for label in row.labels if label >= 0])
        assert told(shown, "text") == BYTES.decode(
            [
                i
                for i, label in zip(row.ids, row.labels, strict=True)
                if i != IMAGE and label == IGNORE
            ]
        )
        end = "\u2039end\u203a" * row.ids.count(END)
        assert told(shown, "image") == f"\u2039image: 16 tokens\u203a{end}"
        assert shown.counts is not None and shown.counts.images == 16
        assert shown.counts.tokens == len(row.ids)
        assert shown.counts.loss == sum(label != IGNORE for label in row.labels)
    assert not rows


def test_words_keep_their_spaces_between_spans(tmp_path: Path, home: Path) -> None:
    [shown] = read(made(tmp_path, [pair("k", PICTURE, "a cat")], "v1"), home)
    assert "".join(span.text for span in shown.spans).endswith(
        f"USER: {told(shown, 'image')} ASSISTANT: a cat<|im_end|>"
    )


def test_two_images_side_by_side_are_two_places(tmp_path: Path, home: Path) -> None:
    parts = (
        Part("user", image=0),
        Part("user", image=1),
        Part("user", text="Which?"),
        Part("assistant", text="Both."),
    )
    [shown] = read(made(tmp_path, [Sample("two", (PICTURE, PICTURE), parts)], "chat"), home)
    assert [span.text for span in shown.spans if span.kind == "image"] == [
        "\u2039image: 16 tokens\u203a"
    ] * 2
    assert len(shown.images) == 2


def test_rows_are_drawn_by_seed_without_replacement(tmp_path: Path, home: Path) -> None:
    stage = made(tmp_path, shapes(rows=40, size=16))
    draws = [[shown.key for shown in read(stage, home, 10, seed=seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 10
    assert len(read(stage, home, 100)) == 40


def test_each_source_of_a_stage_is_shown(home: Path) -> None:
    stage = load("llava").tiny()["instruct"]
    shown = read(stage, home, 1)
    assert [one.source for one in shown] == [source.name for source in stage.data.sources]


def test_bad_sample_is_shown_with_its_reason(tmp_path: Path, home: Path) -> None:
    stage = made(tmp_path, [pair("bad", b"<html>", "its image is none")])
    for [shown] in (read(stage, home), stored(stage.data.sources[0].dataset)):
        assert shown.problem is not None and shown.problem.startswith("not_an_image")
        assert told(shown, "loss") == "its image is none"
        assert "quarantined: not_an_image" in page([shown], "bad")


def test_stored_samples_keep_their_shape(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (1200, 300), "teal").save(file, "JPEG")
    stage = made(tmp_path, [pair("wide", file.getvalue(), "a sea")])
    [shown] = stored(stage.data.sources[0].dataset)
    assert shown.images[0].shape == (3, 64, 256)
    assert shown.spans[:3] == (
        Span("caption: ", "role"),
        Span("\u2039image 0\u203a", "image"),
        Span("a sea", "loss"),
    )
    assert shown.counts is None


def test_missing_dataset_gives_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset here"):
        stored(str(tmp_path / "nowhere"))


def test_page_escapes_all_texts_and_makes_no_external_requests(tmp_path: Path, home: Path) -> None:
    text = page(read(made(tmp_path, [pair(HOSTILE, PICTURE, HOSTILE)]), home), HOSTILE)
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)") == 4  # title twice, key, caption
    assert not re.search(r"(src|href|url)\W+(?!data:)\w+:", text)
    assert "http://" not in text and "https://" not in text


def test_page_contains_the_exact_pixels(tmp_path: Path, home: Path) -> None:
    shown = read(made(tmp_path, shapes(rows=3, size=40)), home)
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', page(shown, "pixels"))
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri)))).transpose(2, 0, 1) for uri in uris
    ]
    np.testing.assert_array_equal(np.stack(images), np.stack([one.images[0] for one in shown]))


def printed(shown: list[Preview], *, color: bool) -> str:
    console = Console(
        file=io.StringIO(),
        force_terminal=color,
        color_system="truecolor" if color else None,
        width=200,
    )
    console.print(terminal(shown, color=color))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_text_of_the_data_cannot_control_the_terminal(tmp_path: Path) -> None:
    key, text = "k\x1b[2J", "a\x1b]0;title\x07 \x9b31m cat\u202e and\ta\ndog"
    stage = made(tmp_path, [pair(key, PICTURE, text)])
    shown = printed(stored(stage.data.sources[0].dataset), color=False)
    assert "k␛[2J" in shown and "a␛]0;title␇ \ufffd31m cat\ufffd and" in shown
    assert not {
        chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (9, 10)
    } & set(shown)


def test_terminal_colors_text_with_loss_and_draws_the_image(tmp_path: Path, home: Path) -> None:
    text = printed(read(made(tmp_path, [pair("k", PICTURE, HOSTILE)]), home), color=True)
    assert f"\x1b[1;32m{HOSTILE}↵" in text
    assert text.count("▀") == 24 * 12


def test_without_color_text_with_loss_is_in_brackets(tmp_path: Path, home: Path) -> None:
    text = printed(read(made(tmp_path, [pair("k", PICTURE, HOSTILE)]), home), color=False)
    assert f"⟦{HOSTILE}↵" in text
    assert "\x1b" not in text and "▀" not in text
