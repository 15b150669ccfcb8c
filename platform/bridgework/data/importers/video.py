"""A folder of videos with captions: in a table, or in a text file of the same name next to each.

A few frames of every video are kept, as JPEG, with their times. The container is identified by its
first bytes, because FFmpeg's own guess accepts playlists, which name other files.
"""

import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from math import isfinite
from typing import Any, NamedTuple, NoReturn

import av
from av import Packet, VideoFrame, VideoStream
from av.container import InputContainer
from PIL import Image

from bridgework.config import config_class
from bridgework.data.importers import (
    UNKNOWN,
    Importer,
    Listing,
    caption,
    fingerprint,
    read_image,
    read_text,
)
from bridgework.data.importers.folder import described, listed
from bridgework.data.importers.tables import files
from bridgework.data.importers.tables import table as read_table
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError

MAX_PIXELS = 8_847_360  # of one frame: 4096 x 2160
MAX_SIDE = 65_500  # of one frame: no JPEG is longer
MAX_RATE = 240  # frames a second; more is work for the decoder and no film
QUALITY = 95  # of the JPEGs
ROUNDING_S = 0.001  # Matroska counts in milliseconds

_CONTAINERS = (
    *(
        (kind, 4, "mp4") for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"skip", b"free", b"pnot")
    ),  # and QuickTime
    (b"\x1aE\xdf\xa3", 0, "matroska"),  # and WebM
    (b"AVI ", 8, "avi"),
    (b"GIF8", 0, "gif"),
)
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
Shot = tuple[float, bytes]  # seconds from the start of the video, and a JPEG


def shots(data: bytes, *, frames: int, fps: float | None, max_s: float) -> list[Shot]:
    """Return at most `frames` frames of an MP4, WebM, Matroska, AVI or GIF, always the same ones.

    By default they are those in the middle of `frames` equal intervals; with `fps`, those at 0,
    1/fps, 2/fps, .. seconds. No frame is returned twice, so a short video may give fewer. Frames
    are upright, and on white where they are transparent. Raises BadSample for another kind of file,
    for a broken or truncated one, for a video of more than `max_s` seconds, and for frames of more
    than MAX_PIXELS, or longer than MAX_SIDE.
    """
    kind = _container(data)
    limit = {"max_pixels": str(MAX_PIXELS)}  # FFmpeg may decode a frame to learn its size
    try:
        with av.open(
            io.BytesIO(data),
            "r",
            format=kind,
            options=limit,
            io_open=_no_other_file,
            metadata_errors="replace",
        ) as file:
            packets = _packets(file, max_s)
            start, length = _span(packets)
            if length > max_s:
                raise BadSample(
                    Reason.BAD_ROW, f"the video lasts {length:.0f} s; at most {max_s:g} s are read"
                )
            step = 1 / fps if fps else length / frames
            times = [(i if fps else i + 0.5) * step for i in range(frames)]
            shown = _shown(
                _decoded(packets, start),
                [time for time in times if time < length - ROUNDING_S] or [0.0],
            )
            return [(time, _jpeg(frame)) for time, frame in shown]
    except (av.FFmpegError, _OtherFile) as error:
        raise BadSample(Reason.CORRUPT, str(error)) from None


class _OtherFile(Exception):
    """A video that names another file."""


def _no_other_file(url: str, flags: int, options: object) -> NoReturn:
    raise _OtherFile(f"the video wants to open {url!r}")


def _container(data: bytes) -> str:
    if not data:
        raise BadSample(Reason.EMPTY_FILE, "the video has 0 bytes")
    kind = next(
        (kind for magic, offset, kind in _CONTAINERS if data.startswith(magic, offset)), None
    )
    if kind is None:
        raise BadSample(
            Reason.NOT_AN_IMAGE,
            f"the bytes begin with {data[:12]!r}; MP4, WebM, Matroska, AVI and GIF are allowed",
        )
    declared = _ENDS[kind](data)
    if declared > len(data):  # FFmpeg reads what is there of it, and says nothing
        raise BadSample(
            Reason.TRUNCATED, f"the file has {len(data)} bytes, and declares at least {declared}"
        )
    return kind


_BOXES = frozenset(  # of an MP4 or QuickTime file, on its first level
    (
        b"ftyp moov mdat free skip wide uuid meta moof mfra sidx ssix styp pdin pnot udta emsg prft"
    ).split()
)


def _mp4_end(data: bytes) -> int:
    """Return the end of the last box, without later bytes that are not a box, e.g. a tag."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4])
        size = int.from_bytes(data[at + 8 : at + 16]) if size == 1 else size
        known = data[at + 4 : at + 8] in _BOXES
        if size < 8 or (not known and at + size > len(data)):  # 0: up to the end of the file
            break
        at += size
    return at


def _gif_end(data: bytes) -> int:
    """Return the end of the trailer, or one byte after the end of the data if there is none."""
    at = 13 + _palette(data[10:11])
    while at < len(data):
        kind, at = data[at], at + 1
        if kind == 0x3B:
            return at
        if kind == 0x2C:  # an image: its place, its palette, the size of its codes
            at += 10 + _palette(data[at + 8 : at + 9])
        elif kind == 0x21:
            at += 1  # the label of an extension
        else:
            break
        while at < len(data) and data[at]:  # blocks of so many bytes
            at += 1 + data[at]
        at += 1
    return len(data) + 1


def _palette(flags: bytes) -> int:
    """Return the bytes of a GIF's palette from its flags: if there is one, and its size."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _matroska_end(data: bytes) -> int:
    """Return the end of the segment after the header; each is a 4-byte id, a size, and content."""
    header, at = _size(data, 4)
    segment, at = _size(data, at + (header or 0) + 4)
    return at + (segment or 0)


def _size(data: bytes, at: int) -> tuple[int | None, int]:
    """Return a number of EBML (None for "unknown") and its end; leading zeros encode its length."""
    length = 9 - data[at].bit_length() if at < len(data) else 1
    bits = (1 << 7 * length) - 1
    number = int.from_bytes(data[at : at + length]) & bits
    return None if number == bits else number, at + length


# the least number of bytes that a file declares to have, by container
_ENDS: dict[str, Callable[[bytes], int]] = {
    "mp4": _mp4_end,
    "matroska": _matroska_end,
    "avi": lambda data: 8 + int.from_bytes(data[4:8], "little"),
    "gif": _gif_end,
}


def _packets(file: InputContainer, max_s: float) -> list["Packet[VideoStream]"]:
    """Return the packets of the file's video, not decoded."""
    stream = file.streams.best("video")
    if not isinstance(stream, VideoStream):
        reason = Reason.NOT_AN_IMAGE if len(file.streams) else Reason.CORRUPT
        raise BadSample(reason, "the file has no video stream")
    context = stream.codec_context
    if context is None:
        raise BadSample(Reason.CORRUPT, "the video names no codec that can be decoded")
    _check_size(context.width, context.height)
    context.options = {
        "max_pixels": str(MAX_PIXELS)
    }  # a frame in the middle may be of another size
    context.thread_count = 1
    packets = list(file.demux(stream))
    if not any(packet.size for packet in packets):
        raise BadSample(Reason.CORRUPT, "the video has no frames")
    if any(packet.is_corrupt for packet in packets):
        raise BadSample(Reason.TRUNCATED, "a frame is beyond the end of the file")
    if len(packets) > MAX_RATE * max_s:
        raise BadSample(
            Reason.BAD_ROW, f"the video has {len(packets)} frames; {MAX_RATE} a second are read"
        )
    return packets


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS or max(width, height) > MAX_SIDE:
        found = f"{width} x {height} pixels" if width else "too many pixels, or none"
        allowed = f"at most {MAX_PIXELS} are decoded, and at most {MAX_SIDE} a side"
        raise BadSample(Reason.TOO_MANY_PIXELS, f"a frame has {found}; {allowed}")


def _span(packets: list["Packet[VideoStream]"]) -> tuple[float, float]:
    """Return the time of the first frame, and the length of the video, in seconds."""
    filled = [packet for packet in packets if packet.size]
    stamps = [packet.dts if packet.pts is None else packet.pts for packet in filled]
    known = sorted(stamp for stamp in stamps if stamp is not None)
    base = filled[0].time_base
    if len(known) < len(stamps) or base is None:
        raise BadSample(Reason.CORRUPT, "the video does not say when its frames are shown")
    start, last = float(known[0] * base), float(known[-1] * base)
    usual = (last - start) / max(len(known) - 1, 1)  # some containers omit the last duration
    length = (
        last - start + max(usual, *(float((packet.duration or 0) * base) for packet in filled[-1:]))
    )
    return start, length


def _decoded(
    packets: list["Packet[VideoStream]"], start: float
) -> Iterator[tuple[float, VideoFrame]]:
    for frame in chain.from_iterable(packet.decode() for packet in packets):
        if frame.is_corrupt or frame.pts is None:
            raise BadSample(Reason.CORRUPT, "a frame is broken, or does not say when it is shown")
        yield max(frame.time - start, 0.0), frame


def _shown(
    decoded: Iterable[tuple[float, VideoFrame]], times: list[float]
) -> Iterator[tuple[float, VideoFrame]]:
    """Yield the frames that are shown at the given times, once each; nothing later is decoded."""
    pending, last = deque(times), None
    for time, frame in decoded:
        if last is not None and pending[0] + ROUNDING_S < time:
            yield last
            while pending and pending[0] + ROUNDING_S < time:
                pending.popleft()
        if not pending:
            return
        last = time, frame
    if last is None:
        raise BadSample(Reason.CORRUPT, "no frame of the video could be decoded")
    yield last


def _jpeg(frame: VideoFrame) -> bytes:
    _check_size(frame.width, frame.height)  # one in the middle may be of another size
    if any(component.is_alpha for component in frame.format.components):
        layers = Image.fromarray(frame.to_ndarray(format="rgba"))
        image = Image.new("RGB", layers.size, "white")
        image.paste(layers, mask=layers.getchannel("A"))
    else:
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _TURNS.get(frame.rotation % 360)  # counterclockwise, as Pillow counts
    file = io.BytesIO()
    (image if turn is None else image.transpose(turn)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


VIDEOS = (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".webm", ".mkv", ".avi", ".gif")
MAX_FRAMES = 64  # of one sample


class Cut(NamedTuple):
    """The frames of a video to keep."""

    frames: int
    fps: float | None
    max_s: float


@config_class
class VideoImporter(Importer):
    """Import the videos under the folder SOURCE: .mp4, .mov, .webm, .mkv, .avi, .gif.

    `table` is a .csv, .tsv, .json (a list) or .jsonl file in it, whose columns `video` and `text`
    hold a path and a caption. Without a table, `cat.txt` describes `cat.mp4`, and all other files
    are left out and counted. `frames` frames spread evenly over the video are kept, or with `fps`
    the first ones at that rate: `frames=8 fps=1` is the setting of Flamingo (arXiv:2204.14198,
    3.1). A video of more than `max_s` seconds is a bad row. A table without such columns is an
    error.
    """

    table: str | None = None
    video: str = "video"
    text: str = "caption"
    frames: int = 8
    fps: float | None = None
    max_s: float = 600.0
    license: str = UNKNOWN

    def __post_init__(self) -> None:
        rate = self.fps is None or (self.fps > 0 and isfinite(self.fps))
        if not 1 <= self.frames <= MAX_FRAMES or not self.max_s > 0 or not rate:
            raise DataError(
                f"frames={self.frames} fps={self.fps} max_s={self.max_s}: 1 to {MAX_FRAMES} frames "
                "are kept, the others above 0"
            )

    def list_rows(self, source: str) -> Listing:
        make = partial(_sample, source, Cut(self.frames, self.fps, self.max_s))
        if self.table is None:
            found = files(source)
            return Listing(
                partial(described, source, found, VIDEOS, make), fingerprint(json.dumps(found))
            )
        content = read_text(f"{source.rstrip('/')}/{self.table}")
        entries = read_table(content, self.table, video=self.video, text=self.text)
        return Listing(partial(listed, entries, self.video, self.text, make), fingerprint(content))


def _sample(source: str, cut: Cut, key: str, name: Any, text: Any) -> Sample:
    described = Part("caption", text=caption(text))
    times, images = zip(*shots(read_image(source, name), **cut._asdict()), strict=True)
    shown = (Part("caption", image=place) for place in range(len(images)))
    return Sample(key, images, (*shown, described), times_s=times)
