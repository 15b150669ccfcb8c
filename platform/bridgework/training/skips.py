"""Samples and steps that a run leaves out, on record: the plan stays, what is named gives way.

A skipped sample is replaced by the next of its source, a skipped step is passed without an update. Both hold from the
checkpoint on that the run goes on from, so what was trained before stays what it was.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from bridgework import storage
from bridgework.data.dataset import Dataset
from bridgework.errors import SpecError

FILE = "skips.json"


@dataclass(frozen=True)
class Skip:
    """One order: keys of samples, and steps, which give way from step `since` on."""

    keys: tuple[str, ...]
    steps: tuple[int, ...]
    since: int
    asked: str  # when, ISO 8601, UTC

    @classmethod
    def of(cls, words: Sequence[str], since: int, steps: int) -> Self:
        """`step:120` and `step:120-125` are steps, all else are keys, of one source as SOURCE/KEY.

        Raises SpecError for a step that is none, or none of a stage of so many `steps`.
        """
        ranges = [_range(word) for word in words if word.startswith("step:")]
        for ahead in ranges:
            if ahead[-1] >= steps:
                raise _idle(ahead[-1], since, steps)
        keys = [word for word in words if not word.startswith("step:")]
        return cls(
            tuple(keys),
            tuple(step for ahead in ranges for step in ahead),
            since,
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def check(self, steps: int, datasets: Mapping[str, Dataset]) -> None:
        """Raises SpecError for what would change nothing: a step that is not ahead, a key that no source has."""
        behind = [step for step in self.steps if step < self.since]
        if behind:
            raise _idle(behind[0], self.since, steps)
        unknown = sorted(_unknown(self.keys, datasets))
        if unknown:
            raise SpecError(
                f"--skip {unknown[0]!r}: no source has a row of this key ({', '.join(datasets)}); "
                "`bridgework data preview --run RUN/STAGE --step N` shows keys; a step is written step:N"
            )


def _idle(step: int, since: int, steps: int) -> SpecError:
    return SpecError(
        f"--skip step:{step} changes nothing: the stage goes on from step {since}, "
        f"and its last is {steps - 1}; leave out steps between these"
    )


def _unknown(keys: Sequence[str], datasets: Mapping[str, Dataset]) -> set[str]:
    left = set(keys)
    for name, dataset in datasets.items():
        for there in dataset.keys() if left else ():
            left -= left.intersection(there) | left.intersection(f"{name}/{key}" for key in there)
    return left


@dataclass(frozen=True)
class Skips:
    """All orders of a stage."""

    orders: tuple[Skip, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Self:
        file = folder / FILE
        if not file.exists():
            return cls()
        orders = json.loads(file.read_text())
        return cls(
            tuple(Skip(tuple(o["keys"]), tuple(o["steps"]), o["since"], o["asked"]) for o in orders)
        )

    def new(self, order: Skip) -> Skip:
        """What of an order is not on record yet."""
        known = {key for key, _ in self.keys}
        keys = tuple(key for key in order.keys if key not in known)
        return replace(
            order, keys=keys, steps=tuple(step for step in order.steps if step not in self.steps)
        )

    def add(self, folder: Path, order: Skip) -> "Skips":
        """With one more, which is on record from now on."""
        both = Skips((*self.orders, order))
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(folder / FILE, json.dumps([asdict(o) for o in both.orders], indent=1))
        return both

    @property
    def keys(self) -> tuple[tuple[str, int], ...]:
        """(key, the first step at which it gives way), for the feed."""
        first: dict[str, int] = {}
        for order in self.orders:
            for key in order.keys:
                first.setdefault(key, order.since)
        return tuple(first.items())

    @property
    def steps(self) -> frozenset[int]:
        return frozenset(step for order in self.orders for step in order.steps)


def _range(word: str) -> range:
    first, dash, last = word.removeprefix("step:").partition("-")
    ends = [first, last] if dash else [first]
    if not all(re.fullmatch("[0-9]{1,15}", end) for end in ends) or int(ends[-1]) < int(first):
        raise SpecError(
            f"--skip {word!r} names no steps; write step:120 or step:120-125, or the key of a sample"
        )
    return range(int(first), int(ends[-1]) + 1)
