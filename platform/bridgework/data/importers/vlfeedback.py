"""VLFeedback (Li et al. 2023, arXiv:2312.10665): several answers a question, each rated by a judge.

A pair is the best and the worst of them, as BLIP-3 takes it (arXiv:2408.08872). JSON lines, Parquet
or Arrow of {"id", "prompt", "image" or "img_path", "completions": [{"response", "annotations":
{aspect: {"Rating"}}}]}.
"""

from collections.abc import Callable
from math import isfinite
from statistics import fmean
from typing import Any

from bridgework.data.dataset import Manifest
from bridgework.data.importers import Say
from bridgework.data.importers.preferences import imported, preference
from bridgework.data.importers.tables import fields
from bridgework.data.quarantine import SHARE, BadSample, Reason, SkippedRow
from bridgework.data.samples import Sample

ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")


def run(
    source: str,
    dest: str,
    *,
    images: str | None = None,
    split: str | None = None,
    license: str = "unknown",
    max_bad: float = SHARE,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Import the file `source`, or the Parquet files of a folder.

    Image paths are relative to `images`, by default the file's own folder. The second question with
    one id gets the key `ID#2`. Questions whose best and worst answers are rated alike are left out
    and counted: they prefer nothing. `split` is needed where Parquet files are of several.
    """
    return imported(
        source, dest, _sample, made_by=__name__, images=images, split=split, license=license,
        max_bad=max_bad, workers=workers, say=say,
    )  # fmt: skip


def _sample(key: str, read: Callable[[], Any], folder: str) -> Sample:
    row = fields(read())
    answers = _rated(row.get("completions"))
    if not answers:
        raise BadSample(
            Reason.BAD_ROW, f"the row has no two answers rated for {', '.join(ASPECTS)}"
        )
    (worst, rejected), (best, chosen) = answers[0], answers[-1]
    if worst == best:
        raise SkippedRow("questions with equally rated answers")
    asked = {name: value for name, value in row.items() if name not in ("text", "conversations")}
    asked["question"] = row.get("prompt", row.get("question"))
    return preference(key, {**asked, "chosen": chosen, "rejected": rejected}, folder)


def _rated(given: Any) -> list[tuple[float, str]]:
    """(mean rating, answer), the worst first and of equals the earlier; empty where fewer than two are whole."""
    rated = []
    for answer in _each(given):
        try:
            text = answer["response"].strip()
            rating = fmean(float(answer["annotations"][aspect]["Rating"]) for aspect in ASPECTS)
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
        ):  # what was not rated is "N/A"
            continue
        if text and isfinite(rating):
            rated.append((rating, text))
    return sorted(rated, key=lambda pair: pair[0]) if len(rated) > 1 else []


def _each(given: Any) -> list[Any]:
    """The answers: a list, or one object with a list in each field, as older releases store it."""
    if isinstance(given, dict) and isinstance(responses := given.get("response"), list):
        return [_nth(given, number) for number in range(len(responses))]
    return given if isinstance(given, list) else []


def _nth(value: Any, number: int) -> Any:
    if isinstance(value, dict):
        return {name: _nth(inner, number) for name, inner in value.items()}
    inside = isinstance(value, list) and number < len(value)
    return value[number] if inside else None
