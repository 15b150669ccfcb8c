"""VLFeedback (Li et al. 2023, arXiv:2312.10665): several answers a question, each rated by a judge.

A pair is the best and the worst of them, as BLIP-3 takes it (arXiv:2408.08872). JSON lines of {"id", "prompt",
"image": a path, "completions": [{"response", "annotations": {aspect: {"Rating"}}}]}.
"""

from collections.abc import Iterator
from functools import partial
from math import isfinite
from statistics import fmean
from typing import Any

from bridgework.data.importers import Row, Say, fingerprint, ingest, read_text
from bridgework.data.importers.preferences import preference
from bridgework.data.quarantine import SHARE, BadSample, LeftOut, Reason
from bridgework.data.samples import Sample
from bridgework.data.shards import Manifest
from bridgework.data.sources import fields, lines, parent

ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")


def run(
    source: str,
    dest: str,
    *,
    images: str | None = None,
    licence: str = "unknown",
    max_bad: float = SHARE,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Import the file `source`; its image paths are relative to `images`, by default the file's own folder.

    Questions whose best and worst answers are rated alike are left out and counted: they prefer nothing.
    """
    text = read_text(source)
    folder = parent(source) if images is None else images
    return ingest(
        partial(_rows, text, folder),
        source,
        dest,
        licence=licence,
        made_by=__name__,
        parameters={"images": folder, "sha256": fingerprint(text)},
        max_bad=max_bad,
        workers=workers,
        say=say,
    )


def _rows(text: str, folder: str) -> Iterator[Row]:
    for number, entry in enumerate(lines(text)):
        name = entry.get("id") if isinstance(entry, dict) else None
        key = str(name or f"row-{number:08d}")
        yield key, partial(_sample, key, entry, folder)


def _sample(key: str, entry: Any, folder: str) -> Sample:
    told = fields(entry)
    answers = _rated(told.get("completions"))
    if not answers:
        raise BadSample(Reason.BAD_ROW, f"the row has no two answers rated for {', '.join(ASPECTS)}")
    (worst, rejected), (best, chosen) = answers[0], answers[-1]
    if worst == best:
        raise LeftOut("questions with equally rated answers")
    shown = {"image": told.get("image"), "question": told.get("prompt")}
    return preference(key, {**shown, "chosen": chosen, "rejected": rejected}, folder)


def _rated(given: Any) -> list[tuple[float, str]]:
    """(mean rating, answer), the worst first and of equals the earlier; empty where fewer than two are whole."""
    rated = []
    for answer in given if isinstance(given, list) else []:
        try:
            text = answer["response"].strip()
            rating = fmean(float(answer["annotations"][aspect]["Rating"]) for aspect in ASPECTS)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # what was not rated is "N/A"
            continue
        if text and isfinite(rating):
            rated.append((rating, text))
    return sorted(rated, key=lambda pair: pair[0]) if len(rated) > 1 else []
