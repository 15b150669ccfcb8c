"""Statistics of a dataset, over all rows; images are read by their headers only and never decoded.

With a stage, also the result of its template and tokenizer: token counts, truncated and quarantined
rows.
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

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # formats that `images.decode` reads
NONE = "not said"  # name in the counts for rows without a language
NO_LIMIT = 1 << 40  # tokens: no row is longer


@dataclass(frozen=True)
class Spread:
    """Quantiles of a quantity; each is a value that occurs."""

    least: float
    low: float  # 5%
    median: float
    high: float  # 95%
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Return the quantiles of `values`, or None if there are none."""
        if not values:
            return None
        return cls(
            *np.quantile(values, (0.0, 0.05, 0.5, 0.95, 1.0), method="inverted_cdf").tolist()
        )


@dataclass(frozen=True)
class Fit:
    """Statistics of the rows as one stage reads them."""

    stage: str
    template: str
    limit: int  # maximum tokens of a row
    tokens: Spread | None  # per row, images included, before truncation
    image_tokens: Spread | None  # per row, before truncation
    trained: Spread | None  # tokens with loss per row, after truncation
    truncated: int  # rows over the limit, which lose their end
    quarantined: Mapping[str, int]  # reason -> rows that the stage would quarantine and replace


@dataclass(frozen=True)
class Stats:
    """Statistics of a dataset. Image sizes are in pixels as stored, before EXIF rotation."""

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
    unreadable: Mapping[str, int]  # reason -> images without a readable header
    languages: Mapping[str, int]
    licenses: Mapping[str, int]  # of the row, or of its dataset if it has none
    left_out: Mapping[str, int]  # reason -> rows of the source that are not in the dataset
    widths: Spread | None
    heights: Spread | None
    aspects: Spread | None  # width / height
    answers: Spread | None  # characters of each caption or answer
    fit: Fit | None = None

    def summary(self) -> dict[str, str]:
        """Return counts and names, formatted for display."""
        summary = {
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
            summary["skipped when written"] = _counts(self.left_out)
        if self.unreadable:
            summary["unreadable images"] = _counts(self.unreadable)
        if (fit := self.fit) is not None:
            share = f"{fit.truncated / self.rows:.2%}"
            summary[f"for {fit.stage}"] = f"template {fit.template}, at most {fit.limit:,} tokens"
            summary["truncated rows"] = f"{fit.truncated:,} ({share})"
            summary["quarantined rows"] = _counts(fit.quarantined) or "0"
        return summary

    def spreads(self) -> dict[str, Spread]:
        """Return the quantiles by name, without those that have no values."""
        spreads = {"width": self.widths, "height": self.heights, "width / height": self.aspects}
        spreads["characters per answer"] = self.answers
        if self.fit is not None:
            spreads["tokens per row"] = self.fit.tokens
            spreads["image tokens per row"] = self.fit.image_tokens
            spreads["trained tokens per row"] = self.fit.trained
        return {name: spread for name, spread in spreads.items() if spread is not None}


def stats(
    path: str, *, for_stage: Stage | None = None, progress: Callable[[int, int], None] | None = None
) -> Stats:
    """Read all rows of the dataset at `path` and return their statistics.

    `progress` is called with (rows done, total rows). `for_stage` reads pairs with the prompts of
    its source at `path`, or of its first source if none has that path. Raises DataError for a
    missing or corrupt dataset, WeightsError if the stage's tokenizer cannot be loaded.
    """
    dataset = open_dataset(path)
    counter = _DatasetCounter(dataset.manifest.license)
    stage_counter = None if for_stage is None else _StageCounter(for_stage, path)
    for done, sample in enumerate(dataset.samples(), 1):
        unreadable = counter.add(sample)
        if stage_counter is not None:
            stage_counter.add(sample, unreadable)
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
        images=sum(n * rows for n, rows in counter.images_per_row.items()),
        kinds=_by_count(counter.kinds),
        images_per_row=dict(sorted(counter.images_per_row.items())),
        formats=_by_count(counter.formats),
        unreadable=_by_count(counter.unreadable),
        languages=_by_count(counter.languages),
        licenses=_by_count(counter.licenses),
        left_out={**manifest.quarantined, **manifest.left_out},
        widths=Spread.of([width for width, _ in counter.sizes]),
        heights=Spread.of([height for _, height in counter.sizes]),
        aspects=Spread.of([width / height for width, height in counter.sizes]),
        answers=Spread.of(counter.answers),
        fit=None if stage_counter is None else stage_counter.result(),
    )


def kind(sample: Sample) -> str:
    """Return pair | conversation | preference | interleaved | video | text."""
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


# --- counting -------------------------------------------------------------------------------------


class _DatasetCounter:
    """Counts that do not depend on a stage."""

    def __init__(self, license: str) -> None:
        self.license = license  # of rows without their own
        self.kinds: Counter[str] = Counter()
        self.images_per_row: Counter[int] = Counter()
        self.formats: Counter[str] = Counter()
        self.unreadable: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.licenses: Counter[str] = Counter()
        self.sizes: list[tuple[int, int]] = []
        self.answers: list[int] = []

    def add(self, sample: Sample) -> dict[int, Reason]:
        """Count a row.

        Returns the indices of its images without a readable header, with the reasons.
        """
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


class _StageCounter:
    """Counts for a stage: the rows are encoded with its template and tokenizer, as in training."""

    def __init__(self, stage: Stage, path: str) -> None:
        self.stage = stage
        self._source: Source = next(
            (s for s in stage.data.leaves if s.dataset == path), stage.data.leaves[0]
        )
        self._encoder = SampleEncoder.of(stage.model, stage.data)
        self._tokens: list[int] = []
        self._image_tokens: list[int] = []
        self._trained: list[int] = []
        self._truncated = 0
        self._quarantined: Counter[str] = Counter()
        self._rows = 0

    def add(self, sample: Sample, unreadable: Mapping[int, Reason]) -> None:
        """Count a row; `unreadable` holds its images without a readable header."""
        try:
            full, truncated = self._encode(sample)
            for index in truncated.images:
                if index in unreadable:
                    raise BadSample(unreadable[index], f"image {index}")
        except BadSample as error:
            self._quarantined[error.reason] += 1
            return
        self._tokens.append(len(full.ids))
        self._image_tokens.append(full.ids.count(IMAGE))
        self._trained.append(len(truncated.labels) - truncated.labels.count(IGNORE))
        self._truncated += len(full.ids) > self._encoder.limit

    def result(self) -> Fit:
        """Return the statistics of all rows that were added."""
        return Fit(
            stage=self.stage.name,
            template=self.stage.data.template,
            limit=self._encoder.limit,
            tokens=Spread.of(self._tokens),
            image_tokens=Spread.of(self._image_tokens),
            trained=Spread.of(self._trained),
            truncated=self._truncated,
            quarantined=_by_count(self._quarantined),
        )

    def _encode(self, sample: Sample) -> tuple[Encoded, Encoded]:
        """Return the row without and with truncation to the limit.

        Successive rows use the prompts in turn.
        """
        row, self._rows = self._rows, self._rows + 1
        parts = read_as(self._source, sample, row, video=self.stage.model.pixels.video)
        layouts = [p.layout for p in self._encoder.pictures(sample) if p.layout is not None]
        full = self._encoder.read(sample, parts, layouts, choice=row, limit=NO_LIMIT)
        if len(full.ids) <= self._encoder.limit:
            return full, full
        return full, self._encoder.read(sample, parts, layouts, choice=row)


def _header(data: bytes) -> Image.Image:
    """Open an image and read its header only.

    Raises BadSample with the reason that decoding would give.
    """
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
