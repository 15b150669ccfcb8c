"""From the plan to rows: each row group is read once a window, each sample decoded on its own, a bad one replaced.

A window is a function of (feed, lane, t): who reads it, when, and what was read before play no part.

# S side in pixels  P patches  D width
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from bridgework.data.batch import Row as Row  # what a reader gives
from bridgework.data.catalog import resolve
from bridgework.data.documents import read_as
from bridgework.data.groups import Features, Groups, Stored
from bridgework.data.manifest import read_manifest
from bridgework.data.plan import Plan, SourceRows
from bridgework.data.quarantine import BadSample, Quarantine, Reason
from bridgework.data.samples import Part, Sample
from bridgework.data.shards import Dataset, open_dataset
from bridgework.data.streams import Streams
from bridgework.data.tiling import lay_out
from bridgework.data.transforms import decode, read_square
from bridgework.errors import DataError
from bridgework.system import Mixture, ModelSpec, Stage


@dataclass(frozen=True)
class Feed:
    """All that a reader on any machine must know to give the rows of one stage."""

    mixture: Mixture
    datasets: tuple[str, ...]  # path or URL of each source's dataset
    digests: tuple[str, ...]  # of their manifests: a dataset that changed since is an error
    batch: int  # samples of a step, over all ranks
    steps: int
    seed: int
    model: ModelSpec  # says what it reads; nothing is built of it here
    pairs: bool = False  # every sample comes with its rejected answer
    features: str | None = None  # folder of cached features, read instead of the images
    quarantine: str | None = None  # folder of the table of bad samples; without one the first bad sample is an error

    @classmethod
    def of(cls, stage: Stage, home: Path, *, features: str | None = None, quarantine: str | None = None) -> Self:
        """The feed of a stage, from its datasets as they are now. Raises DataError where one is missing."""
        paths = tuple(resolve(source.dataset, home) for source in stage.data.sources)
        return cls(
            mixture=stage.data,
            datasets=paths,
            digests=tuple(read_manifest(path).digest for path in paths),
            batch=stage.budget.batch,
            steps=stage.budget.steps,
            seed=stage.seed,
            model=stage.model,
            pairs=any(loss.needs == "preference" for loss in stage.losses),
            features=features,
            quarantine=quarantine,
        )

    def plan(self) -> Plan:
        """Raises DataError if a dataset is not the one that was described."""
        return self._plan(self._open())

    def open(self) -> "Reader":
        """Raises DataError if a dataset, or the cache of its features, is not the one that was described."""
        datasets = self._open()
        return Reader(self, self._plan(datasets), datasets)

    def _plan(self, datasets: Sequence[Dataset]) -> Plan:
        sources = [
            SourceRows(source.name, dataset.manifest.digest, dataset.manifest.rows, dataset.manifest.group_rows)
            for source, dataset in zip(self.mixture.sources, datasets, strict=True)
        ]
        return Plan(sources, self.mixture, batch=self.batch, steps=self.steps, seed=self.seed)

    def _open(self) -> list[Dataset]:
        datasets = [open_dataset(path) for path in self.datasets]
        for source, dataset, digest in zip(self.mixture.sources, datasets, self.digests, strict=True):
            if dataset.manifest.digest != digest:
                raise DataError(
                    f"sources.{source.name}: {dataset.path} is now {dataset.manifest.digest[:12]}, "
                    f"the run began with {digest[:12]}; bring that dataset back, or start a new run"
                )
        return datasets


class _Slot(NamedTuple):
    """One place to fill: `at` in its lane's window is `place` in the global batch of `step`."""

    at: int
    step: int
    place: int


class Reader:
    """Made by `Feed.open`; one per process, not for sharing between threads."""

    def __init__(self, feed: Feed, plan: Plan, datasets: Sequence[Dataset]) -> None:
        self.feed = feed
        self.plan = plan
        self._datasets = datasets
        self._streams = Streams.of(feed.model, feed.mixture)
        features = None if feed.features is None else [Features(feed.features, dataset) for dataset in datasets]
        self._groups = Groups(datasets, features)
        size = feed.model.pixels.size
        self._pixels = feed.model.pixels
        self._shape = features[0].shape if features else (3, size, size)  # of one image
        self._quarantine = None if feed.quarantine is None else Quarantine(feed.quarantine)

    def window(self, lanes: Sequence[int], t: int, first_step: int = 0) -> list[list[Row]]:
        """The rows of `lanes` for each step of window `t` that is neither before `first_step` nor past the last.

        One list a step, in the order of lanes and places. Raises DataError for a corrupt shard, for more bad samples
        than the quarantine allows, and where no good one is left to stand in.
        """
        span = self.feed.mixture.window
        steps = range(max(t * span, first_step), min((t + 1) * span, self.feed.steps))
        read = [self._lane(lane, t, steps) for lane in lanes]
        if self._quarantine is not None:
            self._quarantine.flush()
        each = self.feed.batch // self.feed.mixture.lanes
        return [[row for rows in read for row in rows[k * each : (k + 1) * each]] for k in range(len(steps))]

    def _lane(self, lane: int, t: int, steps: range) -> list[Row]:
        """The rows of one lane for `steps` of window `t`, in order."""
        planned, slots = self.plan.window(lane, t), self._slots(lane, t, steps)
        wanted = defaultdict(list)
        for slot in slots:
            group, within = self._groups.locate(int(planned.source[slot.at]), int(planned.row[slot.at]))
            wanted[group].append((slot, within))
        rows: dict[_Slot, Row] = {}
        for group in sorted(wanted):
            stored = self._groups.read(group, uses=len(wanted[group]))
            for slot, within in wanted[group]:
                row = self._try(group.source, int(planned.row[slot.at]), stored[within], slot)
                if row is not None:
                    rows[slot] = row
        return [rows.get(slot) or self._substitute(lane, t, slot) for slot in slots]

    def _slots(self, lane: int, t: int, steps: range) -> list[_Slot]:
        each, first = self.feed.batch // self.feed.mixture.lanes, t * self.feed.mixture.window
        return [_Slot((step - first) * each + k, step, lane * each + k) for step in steps for k in range(each)]

    def _substitute(self, lane: int, t: int, slot: _Slot) -> Row:
        source = int(self.plan.window(lane, t).source[slot.at])
        for source, _, number in self.plan.substitutes(lane, t, slot.at):
            group, within = self._groups.locate(source, number)
            row = self._try(source, number, self._groups.read(group, uses=0)[within], slot)
            if row is not None:
                return row
        name = self.feed.mixture.sources[source].name
        raise DataError(f"sources.{name}: no good sample is left to replace a bad one; read {self.feed.quarantine}")

    def _try(self, source: int, number: int, stored: Stored, slot: _Slot) -> Row | None:
        """Row `number` of a source in a slot; None if it is bad, and then it is on record."""
        try:
            return self._row(source, stored, slot)
        except BadSample as error:
            if self._quarantine is None:
                name = self.feed.mixture.sources[source].name
                raise DataError(f"sources.{name}, row {number}, {stored.sample.key!r}: {error}") from None
            self._quarantine.add(self.feed.digests[source], stored.sample.key, number, error)
            self._quarantine.check(sum(dataset.manifest.rows for dataset in self._datasets))
            return None

    def _row(self, source: int, stored: Stored, slot: _Slot) -> Row:
        sample, spec = stored.sample, self.feed.mixture.sources[source]
        choice = int(np.random.default_rng([self.feed.seed, slot.step, slot.place]).integers(2**32))
        parts = read_as(spec, sample, choice)
        layouts = self._streams.layouts(sample.images)
        encoded = self._streams.train(parts, layouts, choice=choice)
        rejected = self._streams.train(_rejected(sample, parts), layouts, choice=choice) if self.feed.pairs else None
        return Row(
            step=slot.step,
            place=slot.place,
            key=sample.key,
            source=source,
            ids=encoded.ids,
            labels=encoded.labels,
            images=self._images(stored, encoded.images),
            layouts=tuple(layouts[i] for i in encoded.images) if layouts else (),
            instruction=self._streams.instruction(parts),
            rejected=None if rejected is None else (rejected.ids, rejected.labels),
        )

    def _images(self, stored: Stored, used: Sequence[int]) -> NDArray[Any]:
        """(n, 3, S, S) uint8 or (n, P, D) float16 of the images at the indices `used`, all their tiles in order."""
        images: NDArray[Any]
        if stored.features is None and self._pixels.grids:
            tiles = [lay_out(decode(stored.sample.images[index]), self._pixels)[0] for index in used]
            return np.concatenate([*tiles, np.empty((0, *self._shape), np.uint8)])
        if stored.features is None:
            images = np.empty((len(used), *self._shape), np.uint8)
            for place, index in enumerate(used):
                images[place] = read_square(stored.sample.images[index], self._pixels)
            return images
        images = np.empty((len(used), *self._shape), np.float16)
        for place, index in enumerate(used):
            if not stored.features[index]:
                raise BadSample(Reason.CORRUPT, f"image {index} had no features to cache: it cannot be decoded")
            images[place] = np.frombuffer(stored.features[index], np.float16).reshape(self._shape)
        return images


def _rejected(sample: Sample, parts: Sequence[Part]) -> list[Part]:
    """The same conversation with the worse last answer. Raises BadSample for a sample that has none."""
    if sample.rejected is None:
        raise BadSample(Reason.NO_TARGET, "the stage learns from preferences, and the sample has no rejected answer")
    return [*parts[:-1], replace(parts[-1], text=sample.rejected)]


def local(feed: Feed, *, rank: int, world: int, start: int) -> Iterator[list[Row]]:
    """The rows of one rank for each step from `start` on, read in this process.

    Raises what `Feed.open` and `Reader.window` raise, and SpecError for a rank without a lane.
    """
    reader = feed.open()
    lanes = reader.plan.lanes_of(rank, world)
    for t in range(start // feed.mixture.window, -(-feed.steps // feed.mixture.window)):
        yield from reader.window(lanes, t, first_step=start)
