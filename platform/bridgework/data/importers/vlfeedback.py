"""VLFeedback (Li et al. 2023, arXiv:2312.10665): several rated answers per question.

A pair is the best and the worst of them, as in BLIP-3 (arXiv:2408.08872). JSON lines, Parquet or
Arrow of {"id", "prompt", "image" or "img_path", "completions": [{"response", "annotations":
{aspect: {"Rating"}}}]}.
"""

from collections.abc import Callable
from math import isfinite
from statistics import fmean
from typing import Any

from bridgework.config import config_class
from bridgework.data.importers.preferences import PreferencesImporter, preference
from bridgework.data.importers.tables import fields
from bridgework.data.quarantine import BadSample, Reason, SkippedRow
from bridgework.data.samples import Sample

ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
_UNRATED = (AttributeError, KeyError, TypeError, ValueError, OverflowError)
_UNREAD = ("text", "conversations")  # fields that `preference` would read in place of `prompt`


@config_class
class VLFeedbackImporter(PreferencesImporter):
    """Import the file SOURCE, or the Parquet files of a folder.

    Image paths are relative to `images`, by default the file's own folder. The second question with
    one id gets the key `ID#2`. Questions whose best and worst answers are rated alike are left out
    and counted, because they express no preference. `split` is required if the Parquet files are of
    several.
    """

    def read_row(self, key: str, read: Callable[[], Any], folder: str) -> Sample:
        row = fields(read())
        answers = _rated(row.get("completions"))
        if not answers:
            raise BadSample(
                Reason.BAD_ROW, f"the row has no two answers rated for {', '.join(ASPECTS)}"
            )
        (worst, rejected), (best, chosen) = answers[0], answers[-1]
        if worst == best:
            raise SkippedRow("questions with equally rated answers")
        asked = {name: value for name, value in row.items() if name not in _UNREAD}
        asked["question"] = row.get("prompt", row.get("question"))
        return preference(key, {**asked, "chosen": chosen, "rejected": rejected}, folder)


def _rated(given: Any) -> list[tuple[float, str]]:
    """Return (mean rating, answer), lowest first and stable; [] if fewer than two are rated."""
    rated = []
    for answer in _each(given):
        try:
            text = answer["response"].strip()
            rating = fmean(float(answer["annotations"][aspect]["Rating"]) for aspect in ASPECTS)
        except _UNRATED:  # the rating is "N/A"
            continue
        if text and isfinite(rating):
            rated.append((rating, text))
    return sorted(rated, key=lambda pair: pair[0]) if len(rated) > 1 else []


def _each(given: Any) -> list[Any]:
    """Return the answers: a list, or an object of lists, as older releases store them."""
    if isinstance(given, dict) and isinstance(responses := given.get("response"), list):
        return [_nth(given, number) for number in range(len(responses))]
    return given if isinstance(given, list) else []


def _nth(value: Any, number: int) -> Any:
    if isinstance(value, dict):
        return {name: _nth(inner, number) for name, inner in value.items()}
    inside = isinstance(value, list) and number < len(value)
    return value[number] if inside else None
