"""What is in a dataset, counted over every row; pictures are judged by their headers, nothing is decoded.

With a stage, also what its template and tokenizer make of the rows: how many tokens, what is cut, what is put aside.
"""

import io
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from bridgework.data.dataset import open_dataset
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Sample
from bridgework.data.templates import read_as
from bridgework.data.tokenization import Encoded, SampleEncoder
from bridgework.system import IGNORE, IMAGE, Source, Stage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what `transforms.decode` reads
NONE = "not said"  # how a row without a language is counted
EVERYTHING = 1 << 40  # tokens: no row is longer


@dataclass(frozen=True)
class Spread:
    """Quantiles of what was counted; each is a value that occurs."""

    least: float
    low: float  # 5%
    median: float
    high: float  # 95%
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None where there is nothing to count."""
        if not values:
            return None
        return cls(
            *np.quantile(values, (0.0, 0.05, 0.5, 0.95, 1.0), method="inverted_cdf").tolist()
        )


@dataclass(frozen=True)
class Fit:
    """What one stage makes of the rows."""

    stage: str
    template: str
    limit: int  # tokens that a row may have
    tokens: Spread | None  # per row, images included, before anything is cut
    image_tokens: Spread | None  # per row, likewise
    trained: Spread | None  # tokens with loss per row, after the cut
    truncated: int  # rows that are longer than the limit and lose what is behind it
    quarantined: Mapping[str, int]  # reason -> rows that the stage would put aside and replace


@dataclass(frozen=True)
class Stats:
    """What is in a dataset. Sizes of pictures are in pixels as stored, before EXIF turns them."""

    path: str
    digest: str
    source: str
    made_by: str
    rows: int
    shards: int
    bytes: int  # of the shards
    images: int
    kinds: Mapping[str, int]  # pair | conversation | preference | interleaved | video | text
    images_per_row: Mapping[int, int]
    formats: Mapping[str, int]
    unreadable: Mapping[str, int]  # reason -> pictures without a readable header
    languages: Mapping[str, int]
    licenses: Mapping[str, int]  # the row's own, else the dataset's
    left_out: Mapping[str, int]  # reason -> rows that the source had and the dataset has not
    widths: Spread | None
    heights: Spread | None
    aspects: Spread | None  # width / height
    answers: Spread | None  # characters of each caption or answer
    fit: Fit | None = None

    def facts(self) -> dict[str, str]:
        """Counts and names, ready to print."""
        facts = {
            "dataset": f"{self.path} ({self.digest[:12]})",
            "made by": f"{self.made_by} from {self.source}",
            "rows": f"{self.rows:,} in {self.shards:,} shards, {self.bytes / 1e6:,.1f} MB",
            "kinds": _counts(self.kinds),
            "images": _counts(self.formats) or "0",
            "images per row": _counts(self.images_per_row),
            "languages": _counts(self.languages),
            "licenses": _counts(self.licenses),
        }
        if self.left_out:
            facts["left out when made"] = _counts(self.left_out)
        if self.unreadable:
            facts["unreadable images"] = _counts(self.unreadable)
        if self.fit is not None:
            facts[f"for {self.fit.stage}"] = (
                f"template {self.fit.template}, at most {self.fit.limit:,} tokens"
            )
            facts["truncated rows"] = (
                f"{self.fit.truncated:,} ({self.fit.truncated / self.rows:.2%})"
            )
            facts["quarantined rows"] = _counts(self.fit.quarantined) or "0"
        return facts

    def spreads(self) -> dict[str, Spread]:
        """The quantiles by name; what does not occur is left out."""
        found = {"width": self.widths, "height": self.heights, "width / height": self.aspects}
        found["characters per answer"] = self.answers
        if self.fit is not None:
            found["tokens per row"] = self.fit.tokens
            found["image tokens per row"] = self.fit.image_tokens
            found["trained tokens per row"] = self.fit.trained
        return {name: spread for name, spread in found.items() if spread is not None}


def stats(
    path: str, *, for_stage: Stage | None = None, progress: Callable[[int, int], None] | None = None
) -> Stats:
    """Read every row of the dataset at `path`, and count; `progress` is told (rows done, rows in all).

    `for_stage` reads pairs with the prompts of its source at `path`, or of its first if none is there. Raises DataError
    for a missing or corrupt dataset, WeightsError where the stage's tokenizer is not to be had.
    """
    dataset = open_dataset(path)
    tally = _Tally(dataset.manifest.license)
    fitting = None if for_stage is None else _Fitting(for_stage, path)
    for done, sample in enumerate(dataset.samples(), 1):
        unreadable = tally.add(sample)
        if fitting is not None:
            fitting.add(sample, unreadable)
        if progress is not None:
            progress(done, len(dataset))
    manifest = dataset.manifest
    return Stats(
        path=dataset.path,
        digest=manifest.digest,
        source=manifest.source,
        made_by=manifest.made_by,
        rows=manifest.rows,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        images=sum(n * rows for n, rows in tally.images_per_row.items()),
        kinds=_by_count(tally.kinds),
        images_per_row=dict(sorted(tally.images_per_row.items())),
        formats=_by_count(tally.formats),
        unreadable=_by_count(tally.unreadable),
        languages=_by_count(tally.languages),
        licenses=_by_count(tally.licenses),
        left_out={**manifest.quarantined, **manifest.left_out},
        widths=Spread.of([width for width, _ in tally.sizes]),
        heights=Spread.of([height for _, height in tally.sizes]),
        aspects=Spread.of([width / height for width, height in tally.sizes]),
        answers=Spread.of(tally.answers),
        fit=None if fitting is None else fitting.result(),
    )


def kind(sample: Sample) -> str:
    """pair | conversation | preference | interleaved | video | text."""
    if sample.rejected is not None:
        return "preference"
    if sample.times_s:
        return "video"
    if any(part.role != "caption" for part in sample.parts):
        return "conversation"
    if not sample.images:
        return "text"
    return (
        "pair"
        if [part.image is None for part in sample.parts] in ([False, True], [True, False])
        else "interleaved"
    )


# --- counting --------------------------------------------------------------------------------------------------------


class _Tally:
    """What is counted in any dataset."""

    def __init__(self, license: str) -> None:
        self.license = license  # of rows that name none
        self.kinds: Counter[str] = Counter()
        self.images_per_row: Counter[int] = Counter()
        self.formats: Counter[str] = Counter()
        self.unreadable: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.licenses: Counter[str] = Counter()
        self.sizes: list[tuple[int, int]] = []
        self.answers: list[int] = []

    def add(self, sample: Sample) -> dict[int, Reason]:
        """Count a row; which of its images have no readable header, and why."""
        self.kinds[kind(sample)] += 1
        self.images_per_row[len(sample.images)] += 1
        self.languages[sample.language or NONE] += 1
        self.licenses[sample.license or self.license] += 1
        self.answers += [
            len(p.text)
            for p in sample.parts
            if p.text is not None and p.role in ("caption", "assistant")
        ]
        unreadable = {}
        for index, data in enumerate(sample.images):
            try:
                image = _header(data)
            except BadSample as error:
                unreadable[index] = error.reason
                self.unreadable[error.reason] += 1
            else:
                self.formats[str(image.format)] += 1
                self.sizes.append(image.size)
        return unreadable


class _Fitting:
    """What is counted for a stage: the rows go through its template and its tokenizer, as in training."""

    def __init__(self, stage: Stage, path: str) -> None:
        self.stage = stage
        self._source: Source = next(
            (s for s in stage.data.leaves if s.dataset == path), stage.data.leaves[0]
        )
        self._streams = SampleEncoder.of(stage.model, stage.data)
        self._tokens: list[int] = []
        self._image_tokens: list[int] = []
        self._trained: list[int] = []
        self._truncated = 0
        self._quarantined: Counter[str] = Counter()
        self._rows = 0

    def add(self, sample: Sample, unreadable: Mapping[int, Reason]) -> None:
        try:
            whole, cut = self._encode(sample)
            for index in cut.images:
                if index in unreadable:
                    raise BadSample(unreadable[index], f"image {index}")
        except BadSample as error:
            self._quarantined[error.reason] += 1
            return
        self._tokens.append(len(whole.ids))
        self._image_tokens.append(whole.ids.count(IMAGE))
        self._trained.append(len(cut.labels) - cut.labels.count(IGNORE))
        self._truncated += len(whole.ids) > self._streams.limit

    def result(self) -> Fit:
        return Fit(
            stage=self.stage.name,
            template=self.stage.data.template,
            limit=self._streams.limit,
            tokens=Spread.of(self._tokens),
            image_tokens=Spread.of(self._image_tokens),
            trained=Spread.of(self._trained),
            truncated=self._truncated,
            quarantined=_by_count(self._quarantined),
        )

    def _encode(self, sample: Sample) -> tuple[Encoded, Encoded]:
        """The whole row, and what the limit leaves of it; the prompts take turns."""
        rows, self._rows = self._rows, self._rows + 1
        parts = read_as(self._source, sample, rows, video=self.stage.model.pixels.video)
        layouts = [p.layout for p in self._streams.pictures(sample) if p.layout is not None]
        whole = self._streams.read(sample, parts, layouts, choice=rows, limit=EVERYTHING)
        if len(whole.ids) <= self._streams.limit:
            return whole, whole
        return whole, self._streams.read(sample, parts, layouts, choice=rows)


def _header(data: bytes) -> Image.Image:
    """A picture of which only the header was read. Raises BadSample, with the reason that decoding would give."""
    if not data:
        raise BadSample(Reason.EMPTY_FILE, "the image has 0 bytes")
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample(Reason.TOO_MANY_PIXELS, str(error)) from None
    except UnidentifiedImageError as error:
        raise BadSample(Reason.NOT_AN_IMAGE, str(error)) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise BadSample(Reason.CORRUPT, str(error)) from None


def _by_count(counts: Counter[str]) -> dict[str, int]:
    return {str(name): n for name, n in counts.most_common()}


def _counts(counts: Mapping[str, int] | Mapping[int, int]) -> str:
    return ", ".join(f"{name}: {n:,}" for name, n in counts.items())
