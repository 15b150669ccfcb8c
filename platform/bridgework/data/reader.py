"""Read the rows of the plan: each row group once per window; bad samples are replaced.

A window is a pure function of (feed, lane, t), independent of the reader, of time and of earlier
reads. Its rows are packed and distributed over its steps by cost (`packing`), so that all ranks
have similar work in every step.

# S side in pixels  P patches  D width
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from bridgework.data.catalog import resolve
from bridgework.data.collate import Row as Row
from bridgework.data.dataset import Dataset, open_dataset
from bridgework.data.images import decode, load_image
from bridgework.data.manifest import read_manifest
from bridgework.data.packing import BinLimits, balance, first_fit
from bridgework.data.plan.permutation import derive, key_of, shuffle
from bridgework.data.plan.plan import Plan, SourceRows
from bridgework.data.quarantine import BadSample, Quarantine, Reason
from bridgework.data.row_groups import Features, Groups, StoredRow
from bridgework.data.samples import Part, Sample
from bridgework.data.templates import read_as
from bridgework.data.tiling import tile_image
from bridgework.data.tokenization import SampleEncoder
from bridgework.errors import DataError
from bridgework.system import IGNORE, Layout, Mixture, ModelSpec, Stage


@dataclass(frozen=True)
class ReaderConfig:
    """Complete description of the rows of one stage, for a reader on any machine."""

    mixture: Mixture
    datasets: tuple[str, ...]  # path or URL of each source's dataset
    digests: tuple[str, ...]  # of their manifests: a dataset that changed since is an error
    batch: int  # samples per step, over all ranks
    steps: int
    seed: int
    model: ModelSpec  # read for its input format only; the reader does not build it
    pairs: bool = False  # rows contain the rejected answer too
    lanes: bool = False  # rows contain the number of their lane
    # weight of the answer of a sample without `labels`; None unless the loss reads all answers
    single_answer_weight: float | None = None
    features: str | None = None  # folder of cached features, read instead of the images
    skipped: tuple[tuple[str, int], ...] = ()  # (KEY or SOURCE/KEY, first step without it)
    quarantine: str | None = None  # folder of the table of bad samples; None: the first one raises

    @classmethod
    def of(
        cls,
        stage: Stage,
        home: Path,
        *,
        features: str | None = None,
        quarantine: str | None = None,
        skipped: tuple[tuple[str, int], ...] = (),
    ) -> Self:
        """Return the config of a stage, with its datasets as they are now.

        Raises DataError if one is missing.
        """
        paths = tuple(resolve(source.dataset, home) for source in stage.data.leaves)
        return cls(
            mixture=stage.data,
            datasets=paths,
            digests=tuple(read_manifest(path).digest for path in paths),
            batch=stage.budget.batch,
            steps=stage.budget.steps,
            seed=stage.seed,
            model=stage.model,
            pairs=any(loss.requires == "preference" for loss in stage.losses),
            lanes=any(loss.requires == "match_lane" for loss in stage.losses),
            single_answer_weight=next(
                (
                    getattr(loss, "alone", 1.0)
                    for loss in stage.losses
                    if loss.requires == "answers"
                ),
                None,
            ),
            features=features,
            skipped=skipped,
            quarantine=quarantine,
        )

    def plan(self) -> Plan:
        """Return the plan. Raises DataError if a dataset has another digest than the config."""
        return self._plan(self._open())

    def open(self) -> "Reader":
        """Return a reader.

        Raises DataError if a dataset or its feature cache does not match the config.
        """
        datasets = self._open()
        return Reader(self, self._plan(datasets), datasets)

    def _plan(self, datasets: Sequence[Dataset]) -> Plan:
        sources = [
            SourceRows(
                source.name,
                dataset.manifest.digest,
                dataset.manifest.rows,
                dataset.manifest.group_rows,
            )
            for source, dataset in zip(self.mixture.leaves, datasets, strict=True)
        ]
        return Plan(sources, self.mixture, batch=self.batch, steps=self.steps, seed=self.seed)

    def _open(self) -> list[Dataset]:
        datasets = [open_dataset(path) for path in self.datasets]
        for source, dataset, digest in zip(
            self.mixture.leaves, datasets, self.digests, strict=True
        ):
            if dataset.manifest.digest != digest:
                raise DataError(
                    f"sources.{source.name}: {dataset.path} was changed. Got digest "
                    f"{dataset.manifest.digest[:12]}; the run began with {digest[:12]}. "
                    "Fix: restore that dataset, or start a new run"
                )
        return datasets


class _Planned(NamedTuple):
    """A row of the plan: row `row` of a source, in pass number `epoch` over it."""

    source: int
    epoch: int
    row: int


class _Window(NamedTuple):
    """The planned rows of a lane in window `t`, read."""

    lane: int
    t: int
    planned: list[_Planned]
    good: dict[_Planned, Row]
    bad: dict[_Planned, str]  # their keys


class Reader:
    """Reads the windows of a plan.

    Created by `ReaderConfig.open`, one per process; it is not thread-safe.
    """

    def __init__(self, feed: ReaderConfig, plan: Plan, datasets: Sequence[Dataset]) -> None:
        self.feed = feed
        self.plan = plan
        self._datasets = datasets
        self._encoder = SampleEncoder.of(feed.model, feed.mixture)
        features = (
            None
            if feed.features is None
            else [Features(feed.features, dataset) for dataset in datasets]
        )
        self._groups = Groups(datasets, features)
        size = feed.model.pixels.size
        self._pixels = feed.model.pixels
        self._shape = features[0].shape if features else (3, size, size)  # of one image
        self._quarantine = (
            None
            if feed.quarantine is None
            else Quarantine(feed.quarantine, limit=feed.mixture.max_bad)
        )
        self._skipped = dict(feed.skipped)
        self._limits = _limits(feed, plan)
        self._draws = [
            np.array([key_of(feed.seed, "draws", source.name)], dtype=np.uint64)
            for source in feed.mixture.leaves
        ]
        self._window_key = np.array([key_of(feed.seed, "window")], dtype=np.uint64)

    def window(self, lanes: Sequence[int], t: int, first_step: int = 0) -> list[list[Row]]:
        """Return the rows of `lanes` for each step of window `t` from `first_step` on.

        One list per step, in the order of lanes and places; rows of one place share a sequence.
        Raises DataError for a corrupt shard, for more bad samples than the quarantine allows, and
        if no good sample is left as a replacement.
        """
        span = self.feed.mixture.window
        steps = range(t * span, min((t + 1) * span, self.feed.steps))
        by_lane = [self._lane(lane, t, steps) for lane in lanes]
        if self._quarantine is not None and self._quarantine.flush():
            self._quarantine.check_table(self._total_rows())
        return [
            [row for by_step in by_lane for row in by_step[step - steps.start]]
            for step in steps
            if step >= first_step
        ]

    def _lane(self, lane: int, t: int, steps: range) -> list[list[Row]]:
        """Return the rows of one lane for each of `steps`, which are all steps of window `t`.

        All rows of the window are read, because the costs of all rows decide the step of each.
        """
        window = self._window(lane, t, self.plan.step_rows * len(steps))
        rows = self._rows(window)
        sequences_by_step = []
        for segment in self._epoch_segments(window.planned, len(steps)):
            at = range(segment.start * self.plan.step_rows, segment.stop * self.plan.step_rows)
            sequences = [
                [at[i] for i in sequence] for sequence in self._sequences([rows[i] for i in at])
            ]
            costs = [sum(self._cost(rows[i]) for i in sequence) for sequence in sequences]
            balanced = balance(costs, len(segment))
            number = np.array([steps.start + segment.start], dtype=np.uint64)
            order = shuffle(len(segment), derive(self._window_key, number)).tolist()
            sequences_by_step += [[sequences[i] for i in balanced[step]] for step in order]
        return [
            [
                row
                for k, sequence in enumerate(sequences)
                for row in self._placed(window, step, k, sequence, rows)
            ]
            for step, sequences in zip(steps, sequences_by_step, strict=True)
        ]

    def _epoch_segments(self, planned: Sequence[_Planned], steps: int) -> list[range]:
        """Split the steps of a window into ranges in which no source begins an epoch.

        A row stays in its range. A step in which a source begins an epoch is a range of its own.
        """
        newest: dict[int, int] = {}
        cuts = {0, steps}
        for at, each in enumerate(planned):
            if newest.setdefault(each.source, each.epoch) != each.epoch:
                newest[each.source] = each.epoch
                step, within = divmod(at, self.plan.step_rows)
                cuts |= {step, step + 1} if within else {step}
        ends = sorted(cuts)
        return [range(first, last) for first, last in pairwise(ends)]

    def _sequences(self, rows: Sequence[Row]) -> list[list[int]]:
        """Pack `rows`; return the indices of the rows of each sequence."""
        if self._limits is None:
            return [[at] for at in range(len(rows))]
        tokens, images = [len(row.ids) for row in rows], [row.num_images for row in rows]
        return first_fit(tokens, images, self._limits)

    def _cost(self, row: Row) -> int:
        """Return the text and vision tokens of a row.

        Cached features do not change them, so the order is the same.
        """
        rejected = 0 if row.rejected is None else len(row.rejected[0])
        vision = len(row.images) * self.feed.model.vision_tokens
        return len(row.ids) + rejected + len(row.instruction) + vision

    def _placed(
        self, window: _Window, step: int, k: int, sequence: list[int], rows: list[Row]
    ) -> Iterator[Row]:
        """Yield the rows of the `k`-th sequence of a lane in `step`, with skipped rows replaced.

        If no row of the window fits into the sequence, a skipped row is dropped without a
        replacement.
        """
        placed: list[Row] = []
        for number, at in enumerate(sequence):
            row: Row | None = rows[at]
            if self._skipped_from(rows[at]) <= step:
                others = [*placed, *(rows[other] for other in sequence[number + 1 :])]
                row = self._replacement(window, at, rows[at].key, step, others)
            if row is not None:
                lane = window.lane if self.feed.lanes else None
                placed.append(
                    replace(row, step=step, place=window.lane * self.plan.step_rows + k, lane=lane)
                )
        yield from placed

    def _skipped_from(self, row: Row) -> int:
        """Return the first step that skips a row; steps + 1 for a row that no step skips."""
        if not self._skipped:
            return self.feed.steps + 1
        names = (row.key, f"{self.feed.mixture.leaves[row.source].name}/{row.key}")
        return min(
            (self._skipped[name] for name in names if name in self._skipped),
            default=self.feed.steps + 1,
        )

    def _window(self, lane: int, t: int, count: int) -> _Window:
        """Read the first `count` rows of a lane in window `t`, group by group."""
        planned = [
            _Planned(*map(int, each)) for each in zip(*self.plan.window(lane, t), strict=True)
        ][:count]
        by_group = defaultdict(list)
        for each in planned:
            group, place = self._groups.locate(each.source, each.row)
            by_group[group].append((each, place))
        window = _Window(lane, t, planned, {}, {})
        for group in sorted(by_group):
            stored = self._groups.take(group, [place for _, place in by_group[group]])
            for each, place in by_group[group]:
                row = self._try(each, stored[place])
                if row is None:
                    window.bad[each] = stored[place].sample.key
                else:
                    window.good[each] = row
        return window

    def _rows(self, window: _Window) -> list[Row]:
        """Return the rows of a window in the order of the plan, bad ones replaced."""
        return [
            window.good.get(each) or self._substitute(window, at, window.bad[each], step=-1)
            for at, each in enumerate(window.planned)
        ]

    def _replacement(
        self, window: _Window, at: int, skipped: str, step: int, others: Sequence[Row]
    ) -> Row | None:
        """Return a replacement for the row at `at` that fits with `others`, or None."""
        if not others:
            return self._substitute(window, at, skipped, step)
        near = islice(self._substitutes(window, at, skipped, step), len(window.planned))
        return next((row for row in near if len(self._sequences([row, *others])) == 1), None)

    def _substitute(self, window: _Window, at: int, bad: str, step: int) -> Row:
        """Return the plan's first good substitute of the row at index `at` of a window."""
        for row in self._substitutes(window, at, bad, step):
            return row
        name, look = self.feed.mixture.leaves[window.planned[at].source].name, ""
        if self._quarantine is not None and len(self._quarantine):
            self._quarantine.flush()
            look = f"read {self._quarantine.folder}, then "
        raise DataError(
            f"sources.{name}: no good sample is left to replace {bad!r}. "
            f"Fix: {look}repair the dataset or skip fewer samples"
        )

    def _substitutes(self, window: _Window, at: int, bad: str, step: int) -> Iterator[Row]:
        """Yield good rows in the plan's order, without those that `step` skips.

        For a bad row `step` is -1, so nothing is skipped: a later skip must not change the layout
        of the window.
        """
        for each in map(_Planned._make, self.plan.substitutes(window.lane, window.t, at)):
            row = None if each in window.bad else window.good.get(each) or self._peek(each)
            if row is not None and self._skipped_from(row) > step:
                yield replace(row, replaces=bad)

    def _peek(self, planned: _Planned) -> Row | None:
        """Read a row without using it up in its group; None if it is bad."""
        return self._try(
            planned, self._groups.peek(*self._groups.locate(planned.source, planned.row))
        )

    def _total_rows(self) -> int:
        """Return the rows of all datasets, each counted once: two sources may read the same one."""
        return sum(
            {dataset.manifest.digest: dataset.manifest.rows for dataset in self._datasets}.values()
        )

    def _try(self, planned: _Planned, stored: StoredRow) -> Row | None:
        """Return a row of a source, or None if it is bad; a bad one is added to the quarantine."""
        try:
            return self._row(planned, stored)
        except BadSample as error:
            if self._quarantine is None:
                name = self.feed.mixture.leaves[planned.source].name
                raise DataError(
                    f"sources.{name}, row {planned.row}, {stored.sample.key!r}: {error}"
                ) from None
            self._quarantine.add(
                self.feed.digests[planned.source], stored.sample.key, planned.row, error
            )
            self._quarantine.check(self._total_rows())
            return None

    def _row(self, planned: _Planned, stored: StoredRow) -> Row:
        """Return the row as the stage reads it, without step and place.

        Random choices depend on (seed, source, epoch, row) only.
        """
        sample, spec = stored.sample, self.feed.mixture.leaves[planned.source]
        choice = self._choice(planned)
        parts = read_as(spec, sample, choice, video=self._pixels.video)
        pictures = self._encoder.pictures(sample)
        layouts = [picture.layout for picture in pictures if picture.layout is not None]
        encoded = self._encoder.read(sample, parts, layouts, choice=choice)
        rejected, weight = None, self.feed.single_answer_weight
        if self.feed.pairs:
            rejected = self._encoder.train(_rejected(sample, parts), layouts, choice=choice)
        images = [file for i in encoded.images for file in pictures[i].files]
        return Row(
            step=-1,
            place=-1,
            key=sample.key,
            source=planned.source,
            ids=encoded.ids,
            labels=encoded.labels,
            images=self._images(stored, images),
            layouts=tuple(layouts[i] for i in encoded.images) if layouts else (),
            instruction=self._encoder.instruction(parts),
            rejected=None if rejected is None else (rejected.ids, rejected.labels),
            num_images=len(encoded.images),
            identity=_identity(sample) if self.feed.mixture.by_image else None,
            answers=() if weight is None else self._answers(sample, parts, layouts, weight),
        )

    def _answers(
        self, sample: Sample, parts: Sequence[Part], layouts: Sequence[Layout], single: float
    ) -> tuple[tuple[list[int], float], ...]:
        """Return (ids, weight) of each distinct answer in `labels`, weighted by its share of them.

        A sample without labels has its own answer, with the weight `single`.
        """
        counts = Counter(text for text in sample.labels if text.strip())
        total = sum(counts.values())
        weights = {text: n / total for text, n in counts.items()}
        weights = weights or {parts[-1].text or "": single}
        *question, answer = parts
        answers = {
            text: self._encoder.answer([*question, replace(answer, text=text)], layouts).labels
            for text in weights
        }
        return tuple(
            ([i for i in labels if i != IGNORE], weights[text]) for text, labels in answers.items()
        )

    def _choice(self, planned: _Planned) -> int:
        epoch, row = (
            np.array([number], dtype=np.uint64) for number in (planned.epoch, planned.row)
        )
        return int(derive(derive(self._draws[planned.source], epoch), row)[0] >> np.uint64(32))

    def _images(self, stored: StoredRow, used: Sequence[int]) -> NDArray[Any]:
        """Return the images at the indices `used`, with all their tiles in order.

        Shape (n, 3, S, S) uint8 pixels, or (n, P, D) float16 cached features.
        """
        images: NDArray[Any]
        if stored.features is None and self._pixels.grids:
            tiles = [
                tile_image(decode(stored.sample.images[index]), self._pixels)[0] for index in used
            ]
            return np.concatenate([*tiles, np.empty((0, *self._shape), np.uint8)])
        if stored.features is None:
            images = np.empty((len(used), *self._shape), np.uint8)
            for place, index in enumerate(used):
                images[place] = load_image(stored.sample.images[index], self._pixels)
            return images
        images = np.empty((len(used), *self._shape), np.float16)
        for place, index in enumerate(used):
            if not stored.features[index]:
                raise BadSample(
                    Reason.CORRUPT, f"image {index} has no cached features: it cannot be decoded"
                )
            images[place] = np.frombuffer(stored.features[index], np.float16).reshape(self._shape)
        return images


def _limits(feed: ReaderConfig, plan: Plan) -> BinLimits | None:
    """Return the limits of a packed sequence, or None if each sequence holds one sample."""
    packing = feed.mixture.packing
    if packing is None:
        return None
    samples = plan.step_rows if packing.samples is None else min(packing.samples, plan.step_rows)
    return BinLimits(
        packing.tokens or min(feed.mixture.max_tokens, feed.model.context), samples, packing.images
    )


def _identity(sample: Sample) -> int:
    """Return a hash of the sample's images, 0 or more: equal for equal files."""
    digest = hashlib.blake2b(digest_size=8)
    for image in sample.images:
        digest.update(hashlib.blake2b(image).digest())
    return int.from_bytes(digest.digest()) >> 1


def _rejected(sample: Sample, parts: Sequence[Part]) -> list[Part]:
    """Return the conversation with the rejected answer as the last one.

    Raises BadSample if there is none.
    """
    if sample.rejected is None:
        raise BadSample(
            Reason.NO_TARGET,
            "the stage trains on preferences, and the sample has no rejected answer",
        )
    return [*parts[:-1], replace(parts[-1], text=sample.rejected)]


def local(feed: ReaderConfig, *, rank: int, world: int, start: int) -> Iterator[list[Row]]:
    """Yield the rows of one rank for each step from `start` on, read in this process.

    Raises the errors of `ReaderConfig.open` and `Reader.window`, and SpecError for a rank without a
    lane.
    """
    reader = feed.open()
    lanes = reader.plan.lanes_of(rank, world)
    for t in range(start // feed.mixture.window, -(-feed.steps // feed.mixture.window)):
        yield from reader.window(lanes, t, first_step=start)
