"""Mixtures without a system, by name or file; and the shares after alpha, factors and caps."""

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
PER_LANE = 4  # samples per lane and step, if no batch is given


@config_class
class ByteModelConfig:
    """Model for a mixture without one: bytes as tokens, small images, no limit of length."""

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

    def places(self, layout: Layout) -> int:
        return self.image_tokens

    def build(self, *, pretrained: bool = True) -> Any:
        """Raises SpecError: there is nothing to build."""
        raise SpecError("a mixture alone has no model; name a system")

    def tiny(self) -> Self:
        return self


def load(words: str) -> Mixture:
    """Return the mixture in a JSON file, of a function (`my_lab.mixtures:web`), or of one dataset.

    The JSON has the fields of `Mixture`; a source with `sources` of its own is a group. Raises
    SpecError for anything else.
    """
    if words.endswith(".json"):
        return _read(Path(words))
    module, colon, function = words.partition(":")
    if colon and "/" not in words:
        return _call(module, function)
    return Mixture(
        sources=(Source(name=Path(words).name.replace(".", "-") or "dataset", dataset=words),)
    )


def _read(file: Path) -> Mixture:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{file} is not a mixture in JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("sources"), list):
        raise SpecError(
            f"{file} is not a mixture. Fix: write "
            '{"sources": [{"name": "web", "dataset": "PATH"}, ..], "alpha": 0.5}'
        )
    try:
        sources = tuple(
            _node(node, f"{file}: sources.{i}") for i, node in enumerate(fields.pop("sources"))
        )
        return override(Mixture(sources=sources), fields)
    except RecursionError:
        raise SpecError(f"{file}: its groups are nested too deep") from None


def _node(fields: Any, where: str) -> Source | Group:
    kinds = {"dataset": str, "sources": list}
    given = [kind for kind in kinds if isinstance(fields, Mapping) and kind in fields]
    if (
        len(given) != 1
        or not isinstance(fields.get("name"), str)
        or not isinstance(fields[given[0]], kinds[given[0]])
    ):
        raise SpecError(
            f"{where}: a source has a name and a dataset, a group a name and a list of sources; "
            f"got {fields!r}"
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
            f"there is no mixture {module}:{function}. Got {call!r}; expected a function that "
            "needs "
            "no arguments. Fix: give MODULE:FUNCTION"
        ) from None
    mixture = call()
    if not isinstance(mixture, Mixture):
        raise SpecError(
            f"{module}:{function} is not a mixture. Got {type(mixture).__name__}; expected Mixture"
        )
    return mixture


@dataclass(frozen=True)
class Explained:
    """One source, with its share of the samples after each rule, in [0, 1]."""

    name: str
    rows: int
    by_size: float
    by_alpha: float  # size**alpha, in its group and of its group
    by_factor: float  # ... times the manual factors: what is asked for
    by_cap: float  # ... within max_epochs: what is planned
    realized: float  # of the samples that the budget draws
    epochs: float
    capped: bool
    known: bool  # its dataset is here; otherwise `rows` are those of the recipe


def one_epoch(mixture: Mixture, rows: Sequence[int], batch: int | None = None) -> tuple[int, int]:
    """Return (samples of a step, steps) of one epoch, or of fewer rows if caps allow no more.

    `rows` holds the sizes of the sources. Without `batch`, a step has PER_LANE samples of each
    lane, or fewer where the caps of all sources give no such batch.
    """
    most: float = sum(rows)
    caps = [source.max_epochs for source in mixture.leaves]
    given = [n * cap for n, cap in zip(rows, caps, strict=True) if cap is not None]
    if len(given) == len(rows):
        most = min(most, sum(given))
        size = batch or mixture.lanes * max(1, min(PER_LANE, int(most) // mixture.lanes))
        return size, max(1, int(most) // size)
    size = batch or mixture.lanes * PER_LANE
    return size, -(-sum(rows) // size)


def explain(mixture: Mixture, home: Path, *, batch: int, steps: int) -> list[Explained]:
    """Return the shares of every source in `steps` batches.

    Raises DataError for an unknown size.
    """
    sizes = [_size(source, home) for source in mixture.leaves]
    rows = [rows for rows, _ in sizes]
    sources = [SourceRows(s.name, s.name, n, 1) for s, n in zip(mixture.leaves, rows, strict=True)]
    plan = Plan(sources, mixture, batch=batch, steps=steps, seed=0)
    drawn = plan.realized(steps)
    plain = requested(_without_factors(mixture), rows)
    return [
        Explained(
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
        for share, (n, known), alpha in zip(plan.shares, sizes, plain, strict=True)
    ]


def _without_factors(mixture: Mixture) -> Mixture:
    def plain(node: Source | Group) -> Source | Group:
        if isinstance(node, Group):
            return replace(node, factor=1.0, sources=tuple(plain(inner) for inner in node.sources))
        return replace(node, factor=1.0)

    return replace(mixture, sources=tuple(plain(node) for node in mixture.sources))


def _size(source: Source, home: Path) -> tuple[int, bool]:
    try:
        return read_manifest(resolve(source.dataset, home)).rows, True
    except DataError:
        if source.rows is None:
            raise
        return source.rows, False
