"""What a curation says of its rows and its fields, in words."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridgework.data.quarantine import Reason

SHOWN = 100  # characters of a field's value, in an error


@dataclass
class Tally:
    """What became of the rows that came in, while they are written."""

    counts: Counter[str] = field(default_factory=Counter)  # rows, by the words of their verdicts
    aside: Counter[Reason] = field(default_factory=Counter)  # rows that could not be judged
    used: int = 0  # rows of which something goes on

    def __str__(self) -> str:
        rows = self.counts + Counter({f"put aside: {reason}": rows for reason, rows in self.aside.items()})
        return "; ".join(f"{number:,} {why}" for why, number in rows.most_common())


def identified(source: str, digests: Sequence[str]) -> str:
    """Datasets by the heads of their digests and their places: other rows may lie at the same place by now."""
    return f"{', '.join(digest[:8] for digest in digests)} of {source}"


def as_words(fields: Mapping[str, Any]) -> str:
    """Fields as they are given on a command line; of a long value the end is left out."""
    return shlex.join(f"{name}={_word(value)}" for name, value in fields.items())


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    word = ",".join(map(_word, value)) if isinstance(value, list) else str(value)
    return word if len(word) <= SHOWN else f"{word[:SHOWN]}.."
