"""`bridgework curate`: write a dataset from others, by annotations of models and counters."""

import re
import typing
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bridgework import storage
from bridgework.cli import options
from bridgework.data.catalog import destination, home
from bridgework.errors import SpecError

if TYPE_CHECKING:
    from bridgework.data.manifest import Manifest

out, err = (Console(stderr=stderr, markup=False, highlight=False) for stderr in (False, True))

_CHANGE = re.compile(r"[A-Za-z_]\w*=")  # a path such as a/b=c is not one


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
        typer.Option("--explain", help="print the reasons, and draw kept next to dropped rows"),
    ] = False,
) -> None:
    """Write a curated copy of SOURCE to DEST. Re-running resumes.

    Without arguments, lists the curations; with a NAME alone, its fields. Each row of DEST records
    its provenance.
    """
    from bridgework.curation import load
    from bridgework.curation.runner import PLACE, CurationLimits
    from bridgework.curation.runner import make as run

    if not words:
        out.print(_curations())
        return
    name, *rest = words
    cls = load(name)
    if not rest:
        out.print(options.explanation(cls), "", options.table(cls, CurationLimits, hidden=PLACE))
        return
    places, given = _split(name, rest)
    *sources, dest = places
    own, shared = options.read(f"curate {name}", given, cls, CurationLimits, hidden=PLACE)
    curation, limits = _curation(cls, own, sources), CurationLimits(**shared)
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
        table.add_row(name, options.summary(module))
    return table


def _split(name: str, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return SOURCE... DEST, and the KEY=VALUE arguments after them."""
    start = next((i for i, word in enumerate(words) if _CHANGE.match(word)), len(words))
    places, given = words[:start], words[start:]
    if wrong := [word for word in given if "=" not in word]:
        raise SpecError(
            f"curate {name}: expected KEY=VALUE after the dataset arguments, got {wrong[0]!r}. "
            f"Fix: see `bridgework curate {name}` for its fields"
        )
    if len(places) < 2:
        raise SpecError(
            f"curate {name} takes SOURCE... DEST, and then KEY=VALUE; got {' '.join(words)}"
        )
    return places, options.pairs(given, "max_bad=0.01")


def _curation(cls: type[Any], given: Mapping[str, Any], sources: list[str]) -> Any:
    """Return the curation with these fields; a model's name becomes the folder of its artifact."""
    hints = typing.get_type_hints(cls, include_extras=True)
    read = {
        name: _folders(value) if _names_a_model(hints[name]) else value
        for name, value in given.items()
    }
    return cls(**read, **({"sources": tuple(sources)} if "sources" in hints else {}))


def _names_a_model(hint: Any) -> bool:
    from bridgework.curation.runner import Model

    return hint == Model or Model in typing.get_args(hint)


def _folders(model: Any) -> Any:
    """Return the absolute folders of the artifacts that are named."""
    from bridgework.hf.convert import imported
    from bridgework.tracking.mlflow_store import artifact_of

    if isinstance(model, tuple):
        return tuple(_folders(one) for one in model)
    if model is None:
        return None
    if (Path(model) / "config.json").is_file() and "/" in model:  # as transformers writes a model
        return str(imported(Path(model), home()))
    return str(storage.locate(artifact_of(model, home()), absolute=True))


def _explain(curation: Any, sources: list[str], place: str, made: "Manifest") -> None:
    from bridgework.curation.contact_sheet import sheet

    counts: dict[str, int] = made.parameters["counts"]
    quarantined = {f"quarantined: {reason}": rows for reason, rows in made.quarantined.items()}
    rows_by_reason = counts | quarantined
    total = sum(rows_by_reason.values())
    table = Table("why", "rows", "share", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for reason, rows in sorted(rows_by_reason.items(), key=lambda item: -item[1]):
        table.add_row(reason, f"{rows:,}", f"{rows / total:.1%}")
    out.print(table)
    picture = home() / "curated" / f"{Path(place).name}-{made.digest[:8]}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    storage.save_image(sheet(curation, sources, place, home(), counts), picture)
    out.print(picture, soft_wrap=True)
