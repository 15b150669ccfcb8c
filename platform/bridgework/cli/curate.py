"""`bridgework curate`: make a dataset of others by what models and counts know of their rows."""

import re
import typing
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import MISSING, Field, field, fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bridgework.config import override
from bridgework.data.catalog import destination, home
from bridgework.errors import SpecError

if TYPE_CHECKING:
    from bridgework.curation.runner import Limits
    from bridgework.data.manifest import Manifest

out, err = (Console(stderr=stderr, markup=False, highlight=False) for stderr in (False, True))

NEEDED: Any = object()  # the default of a field that has none
_CHANGE = re.compile(r"[A-Za-z_]\w*=")  # a path such as a/b=c is none


def curate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME SOURCE... DEST [KEY=VALUE]",
            help="dedup, filters, .. or a module of your own",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="actors of Ray; 0 works in this process")] = 0,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="count the reasons, and draw what was kept and dropped"),
    ] = False,
) -> None:
    """Make the dataset DEST of SOURCE: what is kept, dropped or written anew. Run again, it goes on.

    Without words, lists the curations; with a NAME alone, its fields. Each row of DEST knows where it comes from.
    """
    from bridgework.curation import load
    from bridgework.curation.runner import make as run

    if not words:
        out.print(_curations())
        return
    name, *rest = words
    cls = load(name)
    if not rest:
        out.print(_fields(cls))
        return
    places, changes = _split(name, rest)
    *sources, dest = places
    curation, limits = _spec(cls, name, sources, changes)
    place = destination(dest, home())
    if workers:
        from bridgework.ray_utils import ray_session
    with ray_session() if workers else nullcontext():
        say = partial(err.print, soft_wrap=True)
        made = run(curation, sources, place, home=home(), limits=limits, workers=workers, say=say)
    if explain:
        _explain(curation, sources, place, made)
    out.print(place, soft_wrap=True)


def _curations() -> Table:
    from bridgework.curation import known

    table = Table("curation", "", box=None, pad_edge=False)
    for name, module in known().items():
        table.add_row(name, (module.__doc__ or "").strip().partition("\n")[0])
    return table


def _fields(cls: type[Any]) -> Table:
    table = Table("field", "of type", "default", box=None, pad_edge=False)
    hints, own = _hints(cls), _own(cls)
    for item in [*own, *_shared(own)]:
        hint, default = hints[item.name], _default(item)
        words = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        table.add_row(item.name, words, "needed" if default is NEEDED else str(default))
    return table


def _split(name: str, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """SOURCE... DEST, and the KEY=VALUE words behind them."""
    start = next((i for i, word in enumerate(words) if _CHANGE.match(word)), len(words))
    places, pairs = words[:start], [word.partition("=") for word in words[start:]]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise SpecError(f"behind the places stand fields of {name}, KEY=VALUE; got {wrong[0]!r}")
    if len(places) < 2:
        raise SpecError(
            f"curate {name} takes SOURCE... DEST, and then KEY=VALUE; got {' '.join(words)}"
        )
    return places, {key: value for key, _, value in pairs}


def _spec(
    cls: type[Any], name: str, sources: list[str], changes: Mapping[str, str]
) -> "tuple[Any, Limits]":
    """The curation with its fields as given: read and refused as `--set` does; a model's name becomes its folder."""
    from bridgework.curation.runner import Limits

    hints, own = typing.get_type_hints(cls, include_extras=True), _own(cls)
    blank = make_dataclass(
        cls.__name__,
        [(f.name, _hints(cls)[f.name], field(default=_default(f))) for f in [*own, *_shared(own)]],
        frozen=True,
    )
    read = override(blank(), changes)
    limits = Limits(**{f.name: getattr(read, f.name) for f in _shared(own)})
    given = {f.name: getattr(read, f.name) for f in own if f.name in changes}
    if missing := [f.name for f in own if _default(f) is NEEDED and f.name not in given]:
        raise SpecError(f"curate {name} needs {', '.join(f'{field}=VALUE' for field in missing)}")
    given |= {key: _folders(value) for key, value in given.items() if _names_a_model(hints[key])}
    return cls(**given, **({"sources": tuple(sources)} if "sources" in hints else {})), limits


def _own(cls: type[Any]) -> list[Field[Any]]:
    """The fields that a person gives: not those that place a curation in a recipe."""
    from bridgework.curation.runner import PLACE

    return [item for item in fields(cls) if item.name not in PLACE]


def _shared(own: list[Field[Any]]) -> list[Field[Any]]:
    """The fields that every curation takes, but for those that one has of its own."""
    from bridgework.curation.runner import Limits

    return [item for item in fields(Limits) if item.name not in {mine.name for mine in own}]


def _hints(cls: type[Any]) -> dict[str, Any]:
    from bridgework.curation.runner import Limits

    return typing.get_type_hints(Limits) | typing.get_type_hints(cls)


def _default(item: Field[Any]) -> Any:
    """NEEDED for a field that has none."""
    made = item.default if item.default_factory is MISSING else item.default_factory()
    return NEEDED if made is MISSING else made


def _names_a_model(hint: Any) -> bool:
    from bridgework.curation.runner import Model

    return hint == Model or Model in typing.get_args(hint)


def _folders(model: Any) -> Any:
    """The artifacts' folders that words mean, as paths that hold in every folder."""
    from bridgework.hf.convert import imported
    from bridgework.tracking.mlflow_store import artifact_of

    if isinstance(model, tuple):
        return tuple(_folders(one) for one in model)
    if model is None:
        return None
    if (Path(model) / "config.json").is_file() and "/" in model:  # as transformers writes a model
        return str(imported(Path(model), home()))
    return str(Path(artifact_of(model, home())).absolute())


def _explain(curation: Any, sources: list[str], place: str, made: "Manifest") -> None:
    from bridgework.curation.contact_sheet import sheet

    counts: dict[str, int] = made.parameters["counts"]
    aside = {f"put aside: {reason}": rows for reason, rows in made.quarantined.items()}
    total = sum((counts | aside).values())
    table = Table("why", "rows", "share", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for why, rows in sorted((counts | aside).items(), key=lambda item: -item[1]):
        table.add_row(why, f"{rows:,}", f"{rows / total:.1%}")
    out.print(table)
    picture = home() / "curated" / f"{Path(place).name}-{made.digest[:8]}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    sheet(curation, sources, place, home(), counts).save(picture)
    out.print(picture, soft_wrap=True)
