"""Mixtures: the weighted sources of a stage, their grouping, order and packing.

Values only; bridgework.data reads them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf

from bridgework.config import added, bounded, config_class, option
from bridgework.errors import SpecError

SHAPE_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
SHAPE_FORMS = ("circle", "square", "triangle", "diamond")
# labels of synthetic:shapes
SHAPE_LABELS = tuple(f"{color} {form}" for color in SHAPE_COLORS for form in SHAPE_FORMS)
MAX_BAD = 0.005  # with a larger share of bad rows, a dataset counts as broken


@config_class
class Source:
    """One dataset in a mixture. `dataset` is a path, a URL, or a name under <home>/datasets.

    Example:
        >>> import bridgework as bw
        >>> photos = bw.Source(name="photos", dataset="s3://bucket/photos", max_epochs=2.0)
        >>> bw.Mixture(sources=(photos,), template="plain").sources[0].max_epochs
        2.0
    """

    name: str
    dataset: str
    # the paper's count, for `show` and `plan` before the data is available
    rows: int | None = option(default=None)
    factor: float = 1.0  # manual multiplier of the weight
    max_epochs: float | None = None  # cap on how often the stage may repeat a row
    # questions that turn a pair into a question and its caption: one is drawn per row
    prompts: tuple[str, ...] = ()
    # The first words of a caption, up to a drawn position, become the question (prefix LM).
    prefix: bool = False
    # maximum number of images of a document, which is cut before the first image over it
    images: int | None = None
    # share of documents whose texts belong to the image after them, not before (Flamingo)
    following: float = 0.0
    # weight of this source's own mean loss (Flamingo's lambda); None: one mean over all sources
    loss_weight: float | None = None

    def __post_init__(self) -> None:
        if self.loss_weight is not None:
            bounded(f"sources.{self.name}.loss_weight", self.loss_weight, least=0)
        if not 0.0 <= self.following <= 1.0 or (self.images is not None and self.images < 1):
            raise SpecError(
                f"sources.{self.name}: out of range. Got following {self.following:g}, images "
                f"{self.images}; expected following in [0, 1] and images of at least 1"
            )
        _check_factor(self.name, self.factor)
        if self.max_epochs is not None:
            bounded(f"sources.{self.name}.max_epochs", self.max_epochs, above=0)

    def tiny(self, kind: str) -> "Source":
        return replace(self, dataset=f"synthetic:{kind}")


@config_class
class Group:
    """Sources that a mixture treats as one: their sizes are added, with their own alpha."""

    name: str
    sources: "tuple[Source | Group, ...]"
    alpha: float = 1.0
    factor: float = 1.0  # manual multiplier of the group's weight

    def __post_init__(self) -> None:
        _check_sources(f"sources.{self.name}", self.sources, self.alpha)
        _check_factor(self.name, self.factor)


@config_class
class Packing:
    """Packing of several samples into one sequence, with block-diagonal attention and positions.

    Samples are packed by first fit, inside one window of a lane. A lane gives `batch / lanes`
    samples to a step, and a sequence holds at most that many: fewer lanes pack more. The samples of
    a step vary by a few, those of a window never do.
    """

    tokens: int | None = None  # per sequence, images included; None: the mixture's max_tokens
    images: int | None = None  # maximum per sequence, tiles not counted
    samples: int | None = None  # maximum per sequence

    def __post_init__(self) -> None:
        for name, low in (("tokens", 8), ("images", 1), ("samples", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise SpecError(f"packing.{name} must be at least {low}, got {value}")


@config_class
class Mixture:
    """Sources in proportion to size**alpha * factor, and their order.

    alpha = 1/2 is InstructBLIP's square root.

    Example:
        >>> import bridgework as bw
        >>> photos = bw.Source(name="photos", dataset="my-photos", factor=2.0)
        >>> drawings = bw.Source(name="drawings", dataset="emoji")
        >>> mixture = bw.Mixture(sources=(photos, drawings), alpha=0.5)
        >>> [source.dataset for source in mixture.with_dataset("emoji", "s3://lab/emoji").leaves]
        ['my-photos', 's3://lab/emoji']
    """

    sources: tuple[Source | Group, ...]
    alpha: float = 1.0
    template: str = "plain"  # plain | v1 | chat (the tokenizer's own chat template)
    max_tokens: int = 2048  # images included; longer conversations lose their last turns
    packing: Packing | None = None  # None: a sequence is one sample, padded
    # fixed slices of every batch, divided among the ranks: any number of workers sees one order
    lanes: int = 64
    window: int = 16  # steps that one reader prepares at a time
    max_bad: float = option(default=MAX_BAD)  # share of bad rows above which the run stops
    # Losses see which rows have the same image, e.g. the five captions of a COCO image.
    by_image: bool = added(default=False)

    def __post_init__(self) -> None:
        _check_sources("sources", self.sources, self.alpha)
        unique("sources", [s.name for s in self.leaves])
        for name, low in (("lanes", 1), ("window", 1), ("max_tokens", 8)):
            if getattr(self, name) < low:
                raise SpecError(f"{name} must be at least {low}, got {getattr(self, name)}")
        check_max_bad(self.max_bad)
        if len({source.loss_weight is None for source in self.leaves}) > 1:
            raise SpecError(
                "sources: loss_weight is set for some and not for others. "
                "Fix: set it for all sources or for none"
            )

    @property
    def leaves(self) -> tuple[Source, ...]:
        """Sources of all groups in recipe order: the index of the plan, losses and metrics."""
        return tuple(_leaves(self.sources))

    def with_sources(self, change: Callable[[Source], Source]) -> "Mixture":
        """Return the mixture with `change` applied to every source."""
        return replace(self, sources=tuple(_changed(node, change) for node in self.sources))

    def with_dataset(self, name: str, path: str) -> "Mixture":
        """Return the mixture with every source of the dataset `name` reading `path`."""
        return self.with_sources(lambda s: replace(s, dataset=path) if s.dataset == name else s)

    def tiny(self, kind: str = "shapes", *, curated: str | None = None) -> "Mixture":
        """Return the mixture on small synthetic data.

        curated: dataset that the run itself writes; its source stays unchanged.
        """
        small = self.with_sources(lambda s: s if s.dataset == curated else s.tiny(kind))
        return replace(small, max_tokens=min(self.max_tokens, 512), lanes=4, window=4)


@dataclass(frozen=True)
class DatasetInput:
    """A dataset as it was when a run read it."""

    name: str
    digest: str  # of its manifest: identifies the dataset
    path: str
    rows: int


def check_max_bad(share: float) -> None:
    """Raise SpecError if `share` is not in [0, 1]."""
    if not 0 <= share <= 1:
        raise SpecError(f"max_bad is a share of the rows, from 0 to 1; got {share:g}")


def unique(what: str, names: list[str]) -> None:
    """Raise SpecError for a repeated name, or one that cannot be part of a dotted path."""
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise SpecError(f"{what}: the name {twice[0]!r} is used twice. Expected unique names")
    for name in names:
        if not name or set(name) & set(".*/\\") or not name.isprintable():
            raise SpecError(
                f"{what}: {name!r} cannot be a name, because it is part of dotted paths and a "
                "folder. Fix: leave out '.', '*', slashes and line breaks"
            )


def _leaves(nodes: tuple[Source | Group, ...]) -> Iterator[Source]:
    for node in nodes:
        if isinstance(node, Group):
            yield from _leaves(node.sources)
        else:
            yield node


def _changed(node: Source | Group, change: Callable[[Source], Source]) -> Source | Group:
    if isinstance(node, Group):
        return replace(node, sources=tuple(_changed(inner, change) for inner in node.sources))
    return change(node)


def _check_sources(where: str, nodes: tuple[Source | Group, ...], alpha: float) -> None:
    if not nodes:
        raise SpecError(f"{where} is empty: a mixture needs at least one source")
    unique(where, [node.name for node in nodes])
    if not 0.0 <= alpha <= 2.0:
        raise SpecError(
            f"{where}: alpha is out of range. Got {alpha:g}; expected [0, 2] "
            "(0 equal shares, 0.5 square root, 1 by size)"
        )


def _check_factor(name: str, factor: float) -> None:
    if not 0 < factor < inf:
        raise SpecError(
            f"sources.{name}.factor must be above 0 and finite, got {factor:g}. "
            "Fix: drop the source instead"
        )
