"""What a stage trains on: sources in proportion, put together and packed. Values only; bridgework.data feeds them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf

from bridgework.config import added, bounded, config_class, option
from bridgework.errors import SpecError

SHAPE_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
SHAPE_FORMS = ("circle", "square", "triangle", "diamond")
SHAPE_LABELS = tuple(
    f"{color} {form}" for color in SHAPE_COLORS for form in SHAPE_FORMS
)  # of synthetic:shapes
MAX_BAD = 0.005  # more bad rows than this share of a dataset is a broken dataset, not an accident


def check_max_bad(share: float) -> None:
    """Raises SpecError for what is no share."""
    if not 0 <= share <= 1:
        raise SpecError(f"max_bad is a share of the rows, from 0 to 1; got {share:g}")


@config_class
class Source:
    """One dataset in a mixture. `dataset` is a path, a URL, or a name under <home>/datasets."""

    name: str
    dataset: str
    rows: int | None = option(
        default=None
    )  # as the paper counts them, for `show` and `plan` before the data is here
    factor: float = 1.0  # manual multiplier of the weight
    max_epochs: float | None = None  # cap on how often the stage may repeat a row
    prompts: tuple[
        str, ...
    ] = ()  # turn a pair into a question and its caption: one is drawn per row
    prefix: bool = (
        False  # a caption's first words, up to a drawn one, become the question (prefix LM)
    )
    images: int | None = None  # of a document at most: it ends before the first one too many
    following: float = (
        0.0  # share of documents whose texts belong to the image behind them, not before (Flamingo)
    )
    loss_weight: float | None = (
        None  # of this source's own mean loss (Flamingo's lambda); None: one mean over all
    )

    def __post_init__(self) -> None:
        if self.loss_weight is not None:
            bounded(f"sources.{self.name}.loss_weight", self.loss_weight, least=0)
        if not 0.0 <= self.following <= 1.0 or (self.images is not None and self.images < 1):
            raise SpecError(
                f"sources.{self.name}: following lies in [0, 1] and images is at least 1"
            )
        _positive(self.name, self.factor)
        if self.max_epochs is not None:
            bounded(f"sources.{self.name}.max_epochs", self.max_epochs, above=0)

    def tiny(self, kind: str) -> "Source":
        return replace(self, dataset=f"synthetic:{kind}")


@config_class
class Group:
    """Sources that a mixture takes as one: as large as they are together, and shared out by an alpha of their own."""

    name: str
    sources: "tuple[Source | Group, ...]"
    alpha: float = 1.0
    factor: float = 1.0  # manual multiplier of the group's weight

    def __post_init__(self) -> None:
        _shared(f"sources.{self.name}", self.sources, self.alpha)
        _positive(self.name, self.factor)


@config_class
class Packing:
    """Several samples in one sequence, each blind to the others, with positions of its own.

    First fit, inside the window that a lane lays out. A lane gives `batch / lanes` samples to a step, and a sequence
    holds at most as many: fewer lanes pack more. What a step trains on varies by a few samples, a window never does.
    """

    tokens: int | None = None  # of a sequence, images included; None: the mixture's max_tokens
    images: int | None = None  # of a sequence at most, tiles not counted
    samples: int | None = None  # of a sequence at most

    def __post_init__(self) -> None:
        for name, low in (("tokens", 8), ("images", 1), ("samples", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise SpecError(f"packing.{name} must be at least {low}, got {value}")


@config_class
class Mixture:
    """Sources in proportion to size**alpha * factor (alpha = 1/2 is InstructBLIP's square root), and their order."""

    sources: tuple[Source | Group, ...]
    alpha: float = 1.0
    template: str = "plain"  # plain | v1 | chat (the tokenizer's own chat template)
    max_tokens: int = 2048  # images included; longer conversations lose their last turns
    packing: Packing | None = None  # None: a sequence is one sample, padded
    lanes: int = 64  # fixed slices of every batch; ranks share them out, so any number of workers sees one order
    window: int = 16  # steps that one reader lays out at a time
    max_bad: float = option(
        default=MAX_BAD
    )  # share of the rows that may turn out bad before the run stops
    by_image: bool = added(
        default=False
    )  # losses know which rows show one image, as the five captions of COCO's do

    def __post_init__(self) -> None:
        _shared("sources", self.sources, self.alpha)
        unique("sources", [s.name for s in self.leaves])
        for name, low in (("lanes", 1), ("window", 1), ("max_tokens", 8)):
            if getattr(self, name) < low:
                raise SpecError(f"{name} must be at least {low}, got {getattr(self, name)}")
        check_max_bad(self.max_bad)
        if len({source.loss_weight is None for source in self.leaves}) > 1:
            raise SpecError(
                "loss_weight is given for some sources and not for others; give it for all or for none"
            )

    @property
    def leaves(self) -> tuple[Source, ...]:
        """The sources of all groups, in the order of the recipe: what the plan, losses and metrics count by."""
        return tuple(_leaves(self.sources))

    def with_sources(self, change: Callable[[Source], Source]) -> "Mixture":
        """The same mixture of changed sources."""
        return replace(self, sources=tuple(_changed(node, change) for node in self.sources))

    def with_dataset(self, name: str, place: str) -> "Mixture":
        """The same mixture, where all that reads the dataset `name` reads it at `place`."""
        return self.with_sources(lambda s: replace(s, dataset=place) if s.dataset == name else s)

    def tiny(self, kind: str = "shapes", *, made: str | None = None) -> "Mixture":
        """`made` is a dataset that the run makes itself: its source stays."""
        small = self.with_sources(lambda s: s if s.dataset == made else s.tiny(kind))
        return replace(small, max_tokens=min(self.max_tokens, 512), lanes=4, window=4)


def unique(what: str, names: list[str]) -> None:
    """Raises SpecError where a name stands twice, or could not stand in a dotted path."""
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise SpecError(f"{what}: the name {twice[0]!r} stands twice; names must differ")
    for name in names:
        if not name or set(name) & set(".*/\\") or not name.isprintable():
            raise SpecError(
                f"{what}: {name!r} cannot be a name: it is a step of dotted paths and a folder; "
                "leave out '.', '*', slashes and line breaks"
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


def _shared(where: str, nodes: tuple[Source | Group, ...], alpha: float) -> None:
    if not nodes:
        raise SpecError(f"{where} is empty: a mixture needs at least one source")
    unique(where, [node.name for node in nodes])
    if not 0.0 <= alpha <= 2.0:
        raise SpecError(
            f"alpha must lie in [0, 2] (0 equal shares, 0.5 square root, 1 by size), got {alpha:g}"
        )


def _positive(name: str, factor: float) -> None:
    if not 0 < factor < inf:
        raise SpecError(
            f"sources.{name}.factor must be above 0 and finite, got {factor:g}; drop the source instead"
        )


@dataclass(frozen=True)
class DatasetInput:
    """A dataset as a run saw it."""

    name: str
    digest: str  # of its manifest: names the dataset
    path: str
    rows: int
