"""Load a mixture without a system; report the share of each source by alpha, factors and caps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Self

from bridgework.config import config_class, override
from bridgework.data.catalog import resolve
from bridgework.data.manifest import read_manifest
from bridgework.data.plan.plan import Plan, SourceRows
from bridgework.data.plan.shares import requested
from bridgework.errors import DataError, SpecError
from bridgework.mixture import Group, Mixture, Source
from bridgework.plugins import Plugins
from bridgework.system import Layout, Pixels

MIXTURES = Plugins(kind="mixture", example="my_lab.mixtures:web")
PER_LANE = 4  # default samples of a lane and step, without a batch size


@config_class
class ByteModelConfig:
    """Input format of a mixture without a model: bytes as tokens, small images, any length."""

    pixels: ClassVar[Pixels] = Pixels(size=32)
    tokenizer: ClassVar[str] = "bytes"
    context: ClassVar[int] = 1 << 30
    image_tokens: ClassVar[int] = 1
    instruction: ClassVar[None] = None
    pretrained: ClassVar[tuple[str, ...]] = ()
    vision_tokens: ClassVar[int] = 256
    packing_refusal: ClassVar[None] = None

    def unshardable(self, requested: frozenset[str]) -> None:
        return None

    def num_image_tokens(self, layout: Layout) -> int:
        return self.image_tokens

    def build(self, *, pretrained: bool = True) -> Any:
        """Raise SpecError, because a mixture has no model."""
        raise SpecError("a mixture has no model to build. Fix: give a system instead")

    def tiny(self) -> Self:
        return self


def load(name: str) -> Mixture:
    """Load a mixture by JSON file, function (`my_lab.mixtures:web`), or name of one dataset.

    The JSON has the fields of `Mixture`; a source with its own `sources` is a group. Raises
    SpecError if it is not a mixture.
    """
    if name.endswith(".json"):
        return _read(Path(name))
    module, colon, function = name.partition(":")
    if colon and "/" not in name:
        return _call(module, function)
    source = Source(name=Path(name).name.replace(".", "-") or "dataset", dataset=name)
    return Mixture(sources=(source,))


def _read(file: Path) -> Mixture:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{file}: not a mixture in JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("sources"), list):
        raise SpecError(
            f'{file}: not a mixture. Expected {{"sources": [{{"name": "web", "dataset": "PATH"}}, '
            '..], "alpha": 0.5}'
        )
    try:
        sources = tuple(
            _node(node, f"{file}: sources.{i}") for i, node in enumerate(fields.pop("sources"))
        )
        return override(Mixture(sources=sources), fields)
    except RecursionError:
        raise SpecError(f"{file}: its groups are nested too deeply") from None


def _node(fields: Any, where: str) -> Source | Group:
    kinds = {"dataset": str, "sources": list}
    given = [kind for kind in kinds if isinstance(fields, Mapping) and kind in fields]
    if (
        len(given) != 1
        or not isinstance(fields.get("name"), str)
        or not isinstance(fields[given[0]], kinds[given[0]])
    ):
        raise SpecError(
            f"{where}: Got {fields!r}; expected a source (name and dataset) or a group (name and "
            "list of sources)"
        )
    rest = {
        key: value for key, value in fields.items() if key not in ("name", "dataset", "sources")
    }
    if "sources" not in fields:
        return override(Source(name=fields["name"], dataset=fields["dataset"]), rest)
    inner = tuple(_node(node, f"{where}.sources.{i}") for i, node in enumerate(fields["sources"]))
    return override(Group(name=fields["name"], sources=inner), rest)


def _call(module: str, function: str) -> Mixture:
    """Return the mixture of a function without arguments; the errors that it raises are its own."""
    call: Any = getattr(MIXTURES.load(module), function, None)
    try:
        signature(call).bind()  # TypeError too for what cannot be called
    except (TypeError, ValueError):
        raise SpecError(
            f"mixture {module}:{function} not found. Got {call!r}; expected a function that needs "
            "no arguments. Fix: give MODULE:FUNCTION"
        ) from None
    mixture = call()
    if not isinstance(mixture, Mixture):
        raise SpecError(f"{module}:{function}: Got a {type(mixture).__name__}; expected a Mixture")
    return mixture


@dataclass(frozen=True)
class SourceReport:
    """Share of one source in the samples, in [0, 1], after each rule of the mixture."""

    name: str
    rows: int
    by_size: float
    by_alpha: float  # size**alpha, within its group and of its group
    by_factor: float  # ... times the manual factors: requested
    by_cap: float  # ... within max_epochs: planned
    realized: float  # share of the samples in the budget
    epochs: float
    capped: bool
    known: bool  # False if the dataset is missing and `rows` is the number in the recipe


def one_epoch(mixture: Mixture, rows: Sequence[int], batch: int | None = None) -> tuple[int, int]:
    """Return (samples per step, steps) of one pass over all rows, or those that the caps allow.

    `rows` holds the sizes of the sources. By default, a step has PER_LANE samples per lane, or
    fewer if the caps of all sources allow no such batch.
    """
    total: float = sum(rows)
    max_epochs = [source.max_epochs for source in mixture.leaves]
    caps = [n * epochs for n, epochs in zip(rows, max_epochs, strict=True) if epochs is not None]
    if len(caps) == len(rows):
        total = min(total, sum(caps))
        size = batch or mixture.lanes * max(1, min(PER_LANE, int(total) // mixture.lanes))
        return size, max(1, int(total) // size)
    size = batch or mixture.lanes * PER_LANE
    return size, -(-sum(rows) // size)


def explain(mixture: Mixture, home: Path, *, batch: int, steps: int) -> list[SourceReport]:
    """Return the share of every source in `steps` batches, rule by rule.

    Raises DataError for a source of unknown size.
    """
    sizes = [_size(source, home) for source in mixture.leaves]
    rows = [rows for rows, _ in sizes]
    sources = [SourceRows(s.name, s.name, n, 1) for s, n in zip(mixture.leaves, rows, strict=True)]
    plan = Plan(sources, mixture, batch=batch, steps=steps, seed=0)
    drawn = plan.realized(steps)
    alphas = requested(_without_factors(mixture), rows)
    return [
        SourceReport(
            name=share.name,
            rows=n,
            by_size=n / sum(rows),
            by_alpha=float(alpha),
            by_factor=share.requested,
            by_cap=share.weight,
            realized=drawn[share.name] / (batch * steps),
            epochs=drawn[share.name] / n,
            capped=share.capped,
            known=known,
        )
        for share, (n, known), alpha in zip(plan.shares, sizes, alphas, strict=True)
    ]


def _without_factors(mixture: Mixture) -> Mixture:
    """Return the mixture with all factors set to 1."""

    def reset(node: Source | Group) -> Source | Group:
        if isinstance(node, Group):
            return replace(node, factor=1.0, sources=tuple(reset(inner) for inner in node.sources))
        return replace(node, factor=1.0)

    return replace(mixture, sources=tuple(reset(node) for node in mixture.sources))


def _size(source: Source, home: Path) -> tuple[int, bool]:
    """Return (rows, True) of a source's dataset, or (rows in the recipe, False) if missing."""
    try:
        return read_manifest(resolve(source.dataset, home)).rows, True
    except DataError:
        if source.rows is None:
            raise
        return source.rows, False
