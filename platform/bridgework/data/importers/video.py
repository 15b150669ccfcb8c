"""A folder of videos with captions, as `folder` has images: in a table, or in a text file of the same name beside each.

Of every video a few frames are kept, as JPEG, and when each was shown.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from math import isfinite
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from bridgework.data.frames import shots
from bridgework.data.importers import Row, Say, caption, fingerprint, ingest, read_image, read_text
from bridgework.data.importers.folder import keyed
from bridgework.data.quarantine import SHARE, BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.data.shards import Manifest
from bridgework.data.sources import fields, files
from bridgework.data.sources import table as read_table
from bridgework.errors import DataError

VIDEOS = (".mp4", ".m4v", ".webm", ".mkv", ".avi", ".gif")
MAX_FRAMES = 64  # of one sample


class Cut(NamedTuple):
    """Which frames of a video are kept."""

    frames: int
    fps: float | None
    max_s: float


def run(
    source: str,
    dest: str,
    *,
    table: str | None = None,
    video: str = "video",
    text: str = "caption",
    frames: int = 8,
    fps: float | None = None,
    max_s: float = 600.0,
    licence: str = "unknown",
    max_bad: float = SHARE,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Import the videos under the folder `source`: .mp4, .webm, .mkv, .avi, .gif.

    `table` is a .csv, .tsv, .json (a list) or .jsonl file in it, whose columns `video` and `text` hold a path and a
    caption; without a table, `cat.txt` describes `cat.mp4`. Kept are `frames` frames spread evenly over the video, or
    with `fps` the first so many at that rate: `frames=8 fps=1` is what Flamingo trains on (arXiv:2204.14198, 3.1). A
    video of more than `max_s` seconds is a bad row. Raises DataError for what cannot be cut so, and for a table without
    such columns.
    """
    if not 1 <= frames <= MAX_FRAMES or not max_s > 0 or not (fps is None or (fps > 0 and isfinite(fps))):
        raise DataError(
            f"frames={frames} fps={fps} max_s={max_s}: 1 to {MAX_FRAMES} frames are kept, the others above 0"
        )
    cut = Cut(frames, fps, max_s)
    if table is None:
        found = files(source)
        content, listed = json.dumps(found), partial(_beside, source, [name for name, _ in found], cut)
    else:
        content = read_text(f"{source.rstrip('/')}/{table}")
        listed = partial(_listed, source, read_table(content, table, video=video, text=text), video, text, cut)
    return ingest(
        listed,
        source,
        dest,
        licence=licence,
        made_by=__name__,
        parameters={"table": table, "video": video, "text": text, **cut._asdict(), "sha256": fingerprint(content)},
        max_bad=max_bad,
        workers=workers,
        say=say,
    )


def _beside(source: str, names: list[str], cut: Cut) -> Iterator[Row]:
    known = set(names)
    for name in names:
        if name.lower().endswith(VIDEOS):
            description = str(PurePosixPath(name).with_suffix(".txt"))
            yield name, partial(_described, source, name, description if description in known else None, cut)


def _listed(source: str, table: Sequence[Any], video: str, text: str, cut: Cut) -> Iterator[Row]:
    return ((key, partial(_row, source, key, row, video, text, cut)) for key, row in keyed(table, video, text))


def _row(source: str, key: str, row: Any, video: str, text: str, cut: Cut) -> Sample:
    told = fields(row, video, text)
    return _sample(key, source, told[video], told[text], cut)


def _described(source: str, name: str, description: str | None, cut: Cut) -> Sample:
    if description is None:
        raise BadSample(Reason.EMPTY_TEXT, f"there is no text file beside {name}")
    try:
        text = read_image(source, description).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(Reason.BAD_ROW, f"{description} is not UTF-8 text: {error}") from None
    return _sample(name, source, name, text, cut)


def _sample(key: str, source: str, name: Any, text: Any, cut: Cut) -> Sample:
    said = Part("caption", text=caption(text))
    times, images = zip(*shots(read_image(source, name), **cut._asdict()), strict=True)
    shown = (Part("caption", image=place) for place in range(len(images)))
    return Sample(key, images, (*shown, said), times_s=times)
