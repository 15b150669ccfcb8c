"""From the plan to rows: each row group is read once a window, each sample decoded on its own, a bad one replaced.

A window is a function of (feed, lane, t): who reads it, when, and what was read before play no part. Its rows are
packed and laid out on its steps by what they cost (`laying`), so ranks have like work at every step.

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
from bridgework.data.packing import Limits, balance, first_fit
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
    """All that a reader on any machine must know to give the rows of one stage."""

    mixture: Mixture
    datasets: tuple[str, ...]  # path or URL of each source's dataset
    digests: tuple[str, ...]  # of their manifests: a dataset that changed since is an error
    batch: int  # samples of a step, over all ranks
    steps: int
    seed: int
    model: ModelSpec  # says what it reads; nothing is built of it here
    pairs: bool = False  # every sample comes with its rejected answer
    lanes: bool = False  # every row knows its lane
    alone: float | None = (
        None  # weight of an answer that one person gave, where all answers are learned
    )
    features: str | None = None  # folder of cached features, read instead of the images
    skipped: tuple[
        tuple[str, int], ...
    ] = ()  # KEY or SOURCE/KEY of what gives way, each from a step on
    quarantine: str | None = (
        None  # folder of the table of bad samples; without one the first bad sample is an error
    )

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
        """The feed of a stage, from its datasets as they are now. Raises DataError where one is missing."""
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
            alone=next(
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
        """Raises DataError if a dataset is not the one that was described."""
        return self._plan(self._open())

    def open(self) -> "Reader":
        """Raises DataError if a dataset, or the cache of its features, is not the one that was described."""
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
                    f"sources.{source.name}: {dataset.path} is now {dataset.manifest.digest[:12]}, "
                    f"the run began with {digest[:12]}; bring that dataset back, or start a new run"
                )
        return datasets


class _Planned(NamedTuple):
    """One row of the plan: the `row`-th of a source, in its pass number `epoch`."""

    source: int
    epoch: int
    row: int


class _Window(NamedTuple):
    """What the plan gives a lane in window `t`."""

    lane: int
    t: int
    planned: list[_Planned]
    good: dict[_Planned, Row]
    bad: dict[_Planned, str]  # their keys


class Reader:
    """Made by `Feed.open`; one per process, not for sharing between threads."""

    def __init__(self, feed: ReaderConfig, plan: Plan, datasets: Sequence[Dataset]) -> None:
        self.feed = feed
        self.plan = plan
        self._datasets = datasets
        self._streams = SampleEncoder.of(feed.model, feed.mixture)
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
        """The rows of `lanes` for each step of window `t` that is neither before `first_step` nor past the last.

        One list a step, in the order of lanes and places; rows of one place share a sequence. Raises DataError for a
        corrupt shard, for more bad samples than the quarantine allows, and where no good one is left to stand in.
        """
        span = self.feed.mixture.window
        steps = range(t * span, min((t + 1) * span, self.feed.steps))
        read = [self._lane(lane, t, steps) for lane in lanes]
        if self._quarantine is not None and self._quarantine.flush():
            self._quarantine.check_table(self._rows_in_all())
        return [
            [row for laid in read for row in laid[step - steps.start]]
            for step in steps
            if step >= first_step
        ]

    def _lane(self, lane: int, t: int, steps: range) -> list[list[Row]]:
        """The rows of one lane for each of `steps`, all of window `t`.

        All rows of the window are read whatever steps are wanted: what they cost says where each of them goes.
        """
        window = self._window(lane, t, self.plan.step_rows * len(steps))
        rows = self._rows(window)
        laid = []
        for stretch in self._stretches(window.planned, len(steps)):
            at = range(stretch.start * self.plan.step_rows, stretch.stop * self.plan.step_rows)
            sequences = [
                [at[i] for i in sequence] for sequence in self._sequences([rows[i] for i in at])
            ]
            dear = balance(
                [sum(self._cost(rows[i]) for i in sequence) for sequence in sequences], len(stretch)
            )
            number = np.array([steps.start + stretch.start], dtype=np.uint64)
            turn = shuffle(len(stretch), derive(self._window_key, number)).tolist()
            laid += [[sequences[i] for i in dear[turned]] for turned in turn]
        return [
            [
                row
                for k, sequence in enumerate(given)
                for row in self._placed(window, step, k, sequence, rows)
            ]
            for step, given in zip(steps, laid, strict=True)
        ]

    def _stretches(self, planned: Sequence[_Planned], steps: int) -> list[range]:
        """The window's steps in runs inside which no source begins an epoch: a row stays in its run.

        The step in which one does is a run of its own.
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
        """Places in `rows` that share a sequence."""
        if self._limits is None:
            return [[at] for at in range(len(rows))]
        return first_fit([len(row.ids) for row in rows], [row.shown for row in rows], self._limits)

    def _cost(self, row: Row) -> int:
        """Tokens of text and vision that a row brings through the model; cached features change no order."""
        worse = 0 if row.rejected is None else len(row.rejected[0])
        return (
            len(row.ids)
            + worse
            + len(row.instruction)
            + len(row.images) * self.feed.model.vision_tokens
        )

    def _placed(
        self, window: _Window, step: int, k: int, sequence: list[int], rows: list[Row]
    ) -> Iterator[Row]:
        """The rows of the `k`-th sequence that a lane gives to `step`; one that is skipped has given way.

        Where nothing that the window holds fits beside the others of the sequence, these stay by themselves.
        """
        placed: list[Row] = []
        for number, at in enumerate(sequence):
            row: Row | None = rows[at]
            if self._left_out_from(rows[at]) <= step:
                others = [*placed, *(rows[other] for other in sequence[number + 1 :])]
                row = self._stand_in(window, at, rows[at].key, step, others)
            if row is not None:
                lane = window.lane if self.feed.lanes else None
                placed.append(
                    replace(row, step=step, place=window.lane * self.plan.step_rows + k, lane=lane)
                )
        yield from placed

    def _left_out_from(self, row: Row) -> int:
        """The first step at which a row gives way; one behind the last for a row that stays."""
        names = (
            (row.key, f"{self.feed.mixture.leaves[row.source].name}/{row.key}")
            if self._skipped
            else ()
        )
        return min(
            (self._skipped[name] for name in names if name in self._skipped),
            default=self.feed.steps + 1,
        )

    def _window(self, lane: int, t: int, count: int) -> _Window:
        """The first `count` rows that a lane has in window `t`, read group by group."""
        planned = [
            _Planned(*map(int, each)) for each in zip(*self.plan.window(lane, t), strict=True)
        ][:count]
        wanted = defaultdict(list)
        for each in planned:
            group, place = self._groups.locate(each.source, each.row)
            wanted[group].append((each, place))
        window = _Window(lane, t, planned, {}, {})
        for group in sorted(wanted):
            stored = self._groups.take(group, [place for _, place in wanted[group]])
            for each, place in wanted[group]:
                row = self._try(each, stored[place])
                if row is None:
                    window.bad[each] = stored[place].sample.key
                else:
                    window.good[each] = row
        return window

    def _rows(self, window: _Window) -> list[Row]:
        """The rows of a window in the order of the plan, bad ones replaced."""
        return [
            window.good.get(each) or self._substitute(window, at, window.bad[each], step=-1)
            for at, each in enumerate(window.planned)
        ]

    def _stand_in(
        self, window: _Window, at: int, skipped: str, step: int, others: Sequence[Row]
    ) -> Row | None:
        """What stands in for the row at place `at`, beside the `others` of its sequence; None where nothing fits."""
        if not others:
            return self._substitute(window, at, skipped, step)
        near = islice(self._substitutes(window, at, skipped, step), len(window.planned))
        return next((row for row in near if len(self._sequences([row, *others])) == 1), None)

    def _substitute(self, window: _Window, at: int, bad: str, step: int) -> Row:
        """What the plan gives instead of the row at place `at` of a window."""
        for row in self._substitutes(window, at, bad, step):
            return row
        name, told = self.feed.mixture.leaves[window.planned[at].source].name, ""
        if self._quarantine is not None and len(self._quarantine):
            self._quarantine.flush()
            told = f"read {self._quarantine.folder}, then "
        raise DataError(
            f"sources.{name}: no good sample is left to replace {bad!r}; {told}mend the dataset or skip fewer samples"
        )

    def _substitutes(self, window: _Window, at: int, bad: str, step: int) -> Iterator[Row]:
        """Good rows in the plan's order, but for those that `step` leaves out.

        For a bad row `step` is -1, and nothing is left out: a later skip must not lay the window out anew.
        """
        for each in map(_Planned._make, self.plan.substitutes(window.lane, window.t, at)):
            row = None if each in window.bad else window.good.get(each) or self._look(each)
            if row is not None and self._left_out_from(row) > step:
                yield replace(row, stands_for=bad)

    def _look(self, planned: _Planned) -> Row | None:
        """A row that nobody's plan uses now; None if it is bad."""
        return self._try(
            planned, self._groups.look(*self._groups.locate(planned.source, planned.row))
        )

    def _rows_in_all(self) -> int:
        """Of every dataset once: two sources may read one."""
        return sum(
            {dataset.manifest.digest: dataset.manifest.rows for dataset in self._datasets}.values()
        )

    def _try(self, planned: _Planned, stored: StoredRow) -> Row | None:
        """A row of a source; None if it is bad, and then it is on record."""
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
            self._quarantine.check(self._rows_in_all())
            return None

    def _row(self, planned: _Planned, stored: StoredRow) -> Row:
        """The row as the stage reads it, not yet in its place. Draws are of (seed, source, epoch, row) alone."""
        sample, spec = stored.sample, self.feed.mixture.leaves[planned.source]
        choice = self._choice(planned)
        parts = read_as(spec, sample, choice, video=self._pixels.video)
        pictures = self._streams.pictures(sample)
        layouts = [picture.layout for picture in pictures if picture.layout is not None]
        encoded = self._streams.read(sample, parts, layouts, choice=choice)
        rejected = (
            self._streams.train(_rejected(sample, parts), layouts, choice=choice)
            if self.feed.pairs
            else None
        )
        return Row(
            step=-1,
            place=-1,
            key=sample.key,
            source=planned.source,
            ids=encoded.ids,
            labels=encoded.labels,
            images=self._images(
                stored, [file for i in encoded.images for file in pictures[i].files]
            ),
            layouts=tuple(layouts[i] for i in encoded.images) if layouts else (),
            instruction=self._streams.instruction(parts),
            rejected=None if rejected is None else (rejected.ids, rejected.labels),
            shown=len(encoded.images),
            identity=_identity(sample) if self.feed.mixture.by_image else None,
            answers=()
            if self.feed.alone is None
            else self._answers(sample, parts, layouts, self.feed.alone),
        )

    def _answers(
        self, sample: Sample, parts: Sequence[Part], layouts: Sequence[Layout], alone: float
    ) -> tuple[tuple[list[int], float], ...]:
        """The answers that people gave, each once, with the share of those who gave it; else the row's own."""
        people = Counter(text for text in sample.labels if text.strip())
        total = sum(people.values())
        shares = (
            {text: n / total for text, n in people.items()}
            if people
            else {parts[-1].text or "": alone}
        )
        last = len(parts) - 1
        said = {text: [*parts[:last], replace(parts[last], text=text)] for text in shares}
        answers = {
            text: self._streams.answer(turns, layouts).labels for text, turns in said.items()
        }
        return tuple(
            ([i for i in labels if i != IGNORE], shares[text]) for text, labels in answers.items()
        )

    def _choice(self, planned: _Planned) -> int:
        epoch, row = (
            np.array([number], dtype=np.uint64) for number in (planned.epoch, planned.row)
        )
        return int(derive(derive(self._draws[planned.source], epoch), row)[0] >> np.uint64(32))

    def _images(self, stored: StoredRow, used: Sequence[int]) -> NDArray[Any]:
        """(n, 3, S, S) uint8 or (n, P, D) float16 of the images at the indices `used`, all their tiles in order."""
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
                    Reason.CORRUPT, f"image {index} had no features to cache: it cannot be decoded"
                )
            images[place] = np.frombuffer(stored.features[index], np.float16).reshape(self._shape)
        return images


def _limits(feed: ReaderConfig, plan: Plan) -> Limits | None:
    """What a sequence holds; None where each has one sample."""
    packing = feed.mixture.packing
    if packing is None:
        return None
    samples = plan.step_rows if packing.samples is None else min(packing.samples, plan.step_rows)
    return Limits(
        packing.tokens or min(feed.mixture.max_tokens, feed.model.context), samples, packing.images
    )


def _identity(sample: Sample) -> int:
    """Of the sample's images, 0 or more: equal for equal files."""
    digest = hashlib.blake2b(digest_size=8)
    for image in sample.images:
        digest.update(hashlib.blake2b(image).digest())
    return int.from_bytes(digest.digest()) >> 1


def _rejected(sample: Sample, parts: Sequence[Part]) -> list[Part]:
    """The same conversation with the worse last answer. Raises BadSample for a sample that has none."""
    if sample.rejected is None:
        raise BadSample(
            Reason.NO_TARGET,
            "the stage learns from preferences, and the sample has no rejected answer",
        )
    return [*parts[:-1], replace(parts[-1], text=sample.rejected)]


def local(feed: ReaderConfig, *, rank: int, world: int, start: int) -> Iterator[list[Row]]:
    """The rows of one rank for each step from `start` on, read in this process.

    Raises what `Feed.open` and `Reader.window` raise, and SpecError for a rank without a lane.
    """
    reader = feed.open()
    lanes = reader.plan.lanes_of(rank, world)
    for t in range(start // feed.mixture.window, -(-feed.steps // feed.mixture.window)):
        yield from reader.window(lanes, t, first_step=start)
