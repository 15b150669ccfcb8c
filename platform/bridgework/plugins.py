"""Formats by name: a module of a package that ships with bridgework, or one of your own by its import path."""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

from bridgework.errors import DataError, suggest


def names(package: str) -> list[str]:
    """The modules of `package`, as the command line writes them."""
    path = import_module(package).__path__
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(path))


def load(package: str, name: str) -> Callable[..., Any]:
    """The function `run` of a format: of `llava-json` in `package`, or of a module given by its import path.

    Raises DataError, with a suggestion, for a name that is neither, and for a module without `run`.
    """
    path = name if "." in name else f"{package}.{name.replace('-', '_')}"
    try:
        if path.startswith(".") or "/" in path:
            raise ModuleNotFoundError(name=path)  # the path of a file, or relative to nothing
        run: Callable[..., Any] = import_module(path).run
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise  # the format exists; something that it imports does not
        hint = (
            "; one of your own is given by its module's path, e.g. my_lab.photos"
            if {".", "/"} & set(name)
            else ""
        )
        raise DataError(
            f"there is no format {name!r}" + suggest(name, names(package)) + hint
        ) from None
    except AttributeError:
        raise DataError(f"{path} is no format: it has no function run(source, dest, ...)") from None
    return run
