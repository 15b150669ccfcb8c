"""User-requested skips of samples and steps, recorded in skips.json; the plan is unchanged.

A skipped sample is replaced by the next sample of the same source. A skipped step does no optimizer
update. Both start at the checkpoint from which the run resumes, so earlier steps stay reproducible.
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
    """One request: keys of samples, and steps, that are skipped from step `since` on."""

    keys: tuple[str, ...]
    steps: tuple[int, ...]
    since: int
    asked: str  # time of the request, ISO 8601, UTC

    @classmethod
    def of(cls, args: Sequence[str], since: int, steps: int) -> Self:
        """Parse arguments: `step:120` and `step:120-125` are steps, all others are keys.

        SOURCE/KEY is a key of one source. Raises SpecError for an invalid step, or one that a stage
        of `steps` steps does not have.
        """
        ranges = [_range(arg) for arg in args if arg.startswith("step:")]
        for skipped in ranges:
            if skipped[-1] >= steps:
                raise _no_effect(skipped[-1], since, steps)
        keys = [arg for arg in args if not arg.startswith("step:")]
        return cls(
            tuple(keys),
            tuple(step for skipped in ranges for step in skipped),
            since,
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def check(self, steps: int, datasets: Mapping[str, Dataset]) -> None:
        """Raise SpecError for a past step or an unknown key, because they would have no effect."""
        past = [step for step in self.steps if step < self.since]
        if past:
            raise _no_effect(past[0], self.since, steps)
        unknown = sorted(_unknown(self.keys, datasets))
        if unknown:
            raise SpecError(
                f"--skip {unknown[0]!r}: no source has a row with this key "
                f"({', '.join(datasets)}). Fix: look up keys by "
                "`bridgework data preview --run RUN/STAGE --step N`; a step is written step:N"
            )


def _no_effect(step: int, since: int, steps: int) -> SpecError:
    return SpecError(
        f"--skip step:{step} has no effect. Got {step}; expected {since} to {steps - 1}, "
        "from the step at which the stage resumes to its last step"
    )


def _unknown(keys: Sequence[str], datasets: Mapping[str, Dataset]) -> set[str]:
    left = set(keys)
    for name, dataset in datasets.items():
        for known in dataset.keys() if left else ():
            left -= left.intersection(known) | left.intersection(f"{name}/{key}" for key in known)
    return left


@dataclass(frozen=True)
class Skips:
    """All skip requests of a stage."""

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
        """Return the part of a request that is not recorded yet."""
        known = {key for key, _ in self.keys}
        keys = tuple(key for key in order.keys if key not in known)
        return replace(
            order, keys=keys, steps=tuple(step for step in order.steps if step not in self.steps)
        )

    def add(self, folder: Path, order: Skip) -> "Skips":
        """Record one more request and return all of them."""
        skips = Skips((*self.orders, order))
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(folder / FILE, json.dumps([asdict(o) for o in skips.orders], indent=1))
        return skips

    @property
    def keys(self) -> tuple[tuple[str, int], ...]:
        """(key, first step at which it is skipped) pairs, for the reader."""
        first: dict[str, int] = {}
        for order in self.orders:
            for key in order.keys:
                first.setdefault(key, order.since)
        return tuple(first.items())

    @property
    def steps(self) -> frozenset[int]:
        return frozenset(step for order in self.orders for step in order.steps)


def _range(arg: str) -> range:
    first, dash, last = arg.removeprefix("step:").partition("-")
    ends = [first, last] if dash else [first]
    if not all(re.fullmatch("[0-9]{1,15}", end) for end in ends) or int(ends[-1]) < int(first):
        raise SpecError(
            f"--skip: invalid steps. Got {arg!r}; "
            "expected step:120 or step:120-125, or the key of a sample"
        )
    return range(int(first), int(ends[-1]) + 1)
