"""VLFeedback (Li et al. 2023, arXiv:2312.10665): several answers a question, each rated by a judge.

A pair is the best and the worst of them, as BLIP-3 takes it (arXiv:2408.08872). JSON lines of {"id", "prompt",
"image": a path, "completions": [{"response", "annotations": {aspect: {"Rating"}}}]}.
"""

import json
from collections.abc import Iterator
from functools import partial
from math import isfinite
from statistics import fmean
from typing import Any

from bridgework.data.importers import Row, Say, fingerprint, ingest, read_text
from bridgework.data.importers.preferences import preference
from bridgework.data.quarantine import SHARE, BadSample, Reason
from bridgework.data.samples import Sample
from bridgework.data.shards import Manifest

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

    Questions whose best and worst answers are rated alike are left out: they prefer nothing.
    """
    text = read_text(source)
    folder = images if images is not None else source.rpartition("/")[0] or "."
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
    for number, line in enumerate(filter(str.strip, text.splitlines())):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        answers = _rated(entry)
        if answers and answers[0][0] == answers[-1][0]:
            continue
        key = entry.get("id") if isinstance(entry, dict) else None
        yield str(key or f"row-{number:08d}"), partial(_sample, str(key or f"row-{number:08d}"), entry, answers, folder)


def _sample(key: str, entry: Any, answers: list[tuple[float, str]], folder: str) -> Sample:
    if not answers:
        raise BadSample(Reason.BAD_ROW, f"the row has no two answers rated for {', '.join(ASPECTS)}")
    shown = {"image": entry.get("image"), "question": entry.get("prompt")}
    return preference(key, {**shown, "chosen": answers[-1][1], "rejected": answers[0][1]}, folder)


def _rated(entry: Any) -> list[tuple[float, str]]:
    """(mean rating, answer), the worst first and of equals the earlier; empty where fewer than two are whole."""
    given = entry.get("completions") if isinstance(entry, dict) else None
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
