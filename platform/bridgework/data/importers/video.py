"""A folder of videos with captions, as `folder` has images: in a table, or in a text file of the same name beside each.

Of every video a few frames are kept, as JPEG, and when each was shown.
"""

import json
from collections.abc import Iterator
from functools import partial
from math import isfinite
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from bridgework.data.frames import shots
from bridgework.data.importers import Keys, Row, Say, caption, fingerprint, ingest, read_image, read_text
from bridgework.data.quarantine import SHARE, BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.data.shards import Manifest
from bridgework.data.sources import files, rows
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
    video of more than `max_s` seconds is a bad row. Raises DataError for what cannot be cut so.
    """
    if not 1 <= frames <= MAX_FRAMES or not max_s > 0 or not (fps is None or (fps > 0 and isfinite(fps))):
        raise DataError(
            f"frames={frames} fps={fps} max_s={max_s}: 1 to {MAX_FRAMES} frames are kept, the others above 0"
        )
    cut = Cut(frames, fps, max_s)
    found = files(source)
    if table is None:
        content, listed = json.dumps(found), partial(_beside, source, [name for name, _ in found], cut)
    else:
        content = read_text(f"{source.rstrip('/')}/{table}")
        listed = partial(_listed, source, content, table, video, text, cut)
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


def _listed(source: str, content: str, table: str, video: str, text: str, cut: Cut) -> Iterator[Row]:
    keys = Keys()
    for number, row in enumerate(rows(content, table)):
        fields = row if isinstance(row, dict) else {}
        name, said = fields.get(video), fields.get(text)
        key = keys(name, said) if isinstance(name, str) and name else f"row-{number:08d}"
        yield key, partial(_sample, key, source, name, said, cut)


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
