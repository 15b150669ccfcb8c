"""KEY=VALUE arguments of the command line, read by the fields of a config class; and their help."""

import inspect
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, fields, make_dataclass
from functools import partial
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.table import Table

from bridgework.config import override
from bridgework.errors import SpecError

Project = Annotated[str, typer.Option(help="MLflow experiment to record to.")]
MODEL = "Registered model (llava, llava@challenger, llava:3) or the folder of an artifact."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
REQUIRED: Any = object()  # the default of a field that has none


def pairs(words: Iterable[str] | None, example: str) -> dict[str, str]:
    """Split KEY=VALUE arguments into a mapping.

    Raises SpecError, with `example`, for one without `=`.
    """
    read = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise SpecError(f"{word!r} is not of the form KEY=VALUE, e.g. {example}")
        read[key.strip()] = value
    return read


def changes(words: list[str] | None) -> dict[str, Any]:
    """Return the arguments of `--set`, for `config.override`."""
    return pairs(words, "--set stages.align.optim.peak_lr=3e-4")


def number_or_range(word: str) -> int | tuple[int, int]:
    """Return the number of workers `N`, or the range `MIN:MAX`. Raises SpecError."""
    match = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", word.strip())
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
    if least > most or (least == 0 and most > 0):
        raise SpecError(
            f"--workers: not a number or a range of workers. Got {word!r}; expected N, or MIN:MAX "
            "with 1 <= MIN <= MAX, e.g. 1:4"
        )
    return least if least == most else (least, most)


def read(
    name: str, given: Mapping[str, str], *classes: type[Any], hidden: Iterable[str] = ()
) -> tuple[dict[str, Any], ...]:
    """Return the arguments for each of these config classes, from the `given` values.

    A value is parsed and refused as `--set` does it, by the type of its field. A field of several
    classes belongs to the first; the `hidden` ones are unknown. Raises SpecError, with a
    suggestion, for an unknown field, for a value of another type, and for a required field that is
    missing.
    """
    own = _fields(classes, hidden)
    form = make_dataclass(
        name,
        [(f.name, hint, field(default=_default(f))) for f, hint in own.values()],
        frozen=True,
    )
    values = override(form(), given)
    chosen = {key.partition(".")[0] for key in given}
    missing = [n for n, (f, _) in own.items() if _default(f) is REQUIRED and n not in chosen]
    if missing:
        raise SpecError(f"{name} needs {', '.join(f'{field}=VALUE' for field in missing)}")
    found: list[dict[str, Any]] = []
    for cls in classes:
        names = [f.name for f in fields(cls) if f.name in chosen and own[f.name][0] in fields(cls)]
        found.append({name: getattr(values, name) for name in names})
    return tuple(found)


def table(*classes: type[Any], hidden: Iterable[str] = ()) -> Table:
    """Return the fields of these config classes with their types and defaults, each once."""
    rows = Table("field", "of type", "default", box=None, pad_edge=False)
    for item, hint in _fields(classes, hidden).values():
        kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        default = _default(item)
        rows.add_row(item.name, kind, "required" if default is REQUIRED else str(default))
    return rows


def summary(module: ModuleType) -> str:
    """Return the first line of the docstring of a module."""
    return (inspect.getdoc(module) or "").partition("\n")[0]


def explanation(cls: type[Any]) -> str:
    """Return the docstring of a class, or that of its module if it has none of its own."""
    text = inspect.getdoc(cls) or ""
    if text.startswith(f"{cls.__name__}("):  # as the decorator writes one
        text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return re.sub(r"(?<!\n)\n(?=\S)", " ", text)  # a paragraph is one line: the terminal breaks it


def _fields(
    classes: tuple[type[Any], ...], hidden: Iterable[str]
) -> dict[str, tuple[Field[Any], Any]]:
    """Return (field, type) by name; a class's own fields come before inherited ones."""
    found: dict[str, tuple[Field[Any], Any]] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for item in sorted(fields(cls), key=partial(_depth, cls)):
            if item.name not in hidden:
                found.setdefault(item.name, (item, hints[item.name]))
    return found


def _depth(cls: type[Any], item: Field[Any]) -> int:
    """Return how many bases above `cls` its field is defined."""
    return next(
        depth
        for depth, base in enumerate(cls.__mro__)
        if item.name in inspect.get_annotations(base)
    )


def _default(item: Field[Any]) -> Any:
    """Return the default of a field, REQUIRED where it has none."""
    default = item.default if item.default_factory is MISSING else item.default_factory()
    return REQUIRED if default is MISSING else default
