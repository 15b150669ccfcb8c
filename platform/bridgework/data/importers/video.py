"""A folder of videos with captions, as `folder` has images: in a table, or in a text file each.

Of every video a few frames are kept, as JPEG, and when each was shown.
"""

import json
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

from bridgework.data.frames import shots
from bridgework.data.importers import Say, caption, fingerprint, ingest, read_image, read_text
from bridgework.data.importers.folder import described, listed
from bridgework.data.quarantine import SHARE
from bridgework.data.samples import Part, Sample
from bridgework.data.shards import Manifest
from bridgework.data.sources import files
from bridgework.data.sources import table as read_table
from bridgework.errors import DataError

VIDEOS = (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".webm", ".mkv", ".avi", ".gif")
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
    """Import the videos under the folder `source`: .mp4, .mov, .webm, .mkv, .avi, .gif.

    `table` is a .csv, .tsv, .json (a list) or .jsonl file in it, whose columns `video` and `text` hold a path and a
    caption; without a table, `cat.txt` describes `cat.mp4`, and all other files are left out and counted. Kept are
    `frames` frames spread evenly over the video, or with `fps` the first so many at that rate: `frames=8 fps=1` is what
    Flamingo trains on (arXiv:2204.14198, 3.1). A video of more than `max_s` seconds is a bad row. Raises DataError for
    what cannot be cut so, and for a table without such columns.
    """
    if not 1 <= frames <= MAX_FRAMES or not max_s > 0 or not (fps is None or (fps > 0 and isfinite(fps))):
        raise DataError(
            f"frames={frames} fps={fps} max_s={max_s}: 1 to {MAX_FRAMES} frames are kept, the others above 0"
        )
    cut = Cut(frames, fps, max_s)
    make = partial(_sample, source, cut)
    if table is None:
        found = files(source)
        content, rows = json.dumps(found), partial(described, source, found, VIDEOS, make)
    else:
        content = read_text(f"{source.rstrip('/')}/{table}")
        entries = read_table(content, table, video=video, text=text)
        rows = partial(listed, entries, video, text, make)
    return ingest(
        rows,
        source,
        dest,
        licence=licence,
        made_by=__name__,
        parameters={"table": table, "video": video, "text": text, **cut._asdict(), "sha256": fingerprint(content)},
        max_bad=max_bad,
        workers=workers,
        say=say,
    )


def _sample(source: str, cut: Cut, key: str, name: Any, text: Any) -> Sample:
    said = Part("caption", text=caption(text))
    times, images = zip(*shots(read_image(source, name), **cut._asdict()), strict=True)
    shown = (Part("caption", image=place) for place in range(len(images)))
    return Sample(key, images, (*shown, said), times_s=times)
