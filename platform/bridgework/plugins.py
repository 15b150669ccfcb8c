"""Plug-ins by name: a module that ships with bridgework, or one of your own by its import path.

A plug-in is a module (a recipe, a sweep space, a family of models) or the one public config class
in a module (an importer, an exporter, a curation). `Plugins` describes a kind and finds its
members.
"""

import inspect
import pkgutil
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from traceback import extract_tb
from types import ModuleType
from typing import Any

from bridgework.errors import BridgeworkError, SpecError, suggest


@dataclass(frozen=True, kw_only=True)
class Plugins:
    """A kind of plug-in: the modules of `package`, and any other module by its import path.

    A module of this kind defines all `attributes`. With `methods`, the plug-in is the one public
    config class in the module that has all of them.
    """

    kind: str  # in messages, e.g. "format"
    package: str | None = None  # of the plug-ins that ship; None: import paths only
    attributes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    example: str = ""  # an import path, for messages
    hint: str = ""  # where the form of a plug-in is documented
    separator: str = "_"  # between the words of a name on the command line
    error: type[BridgeworkError] = SpecError

    def modules(self) -> dict[str, ModuleType]:
        """Import the shipped plug-ins. Returns their modules by name, sorted.

        Raises `error` for a module whose import fails.
        """
        found = {name: self.find(name) for name in self._module_names()}
        return {
            name.replace("_", self.separator): module
            for name, module in found.items()
            if module is not None and self._holds(module)
        }

    def names(self) -> list[str]:
        """Return the names of the shipped plug-ins, sorted, as the command line writes them.

        They are imported only where `attributes` or `methods` tell them from other modules.
        """
        if self.attributes or self.methods:
            return list(self.modules())
        return [name.replace("_", self.separator) for name in self._module_names()]

    def classes(self) -> list[type[Any]]:
        """Return every config class with `methods` in the shipped modules, by module."""
        return [cls for module in self.modules().values() for cls in self._classes(module)]

    def find(self, name: str) -> ModuleType | None:
        """Return the module of a plug-in, or None if there is no such module.

        Raises `error` for a module that exists and whose import fails.
        """
        path = self._path(name)
        if not all(part.replace("-", "_").isidentifier() for part in path.split(".")):
            return None  # the path of a file, or a relative import
        try:
            return import_module(path)
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is not None and f"{path}.".startswith(f"{missing}."):
                return None
            raise self.error(
                f"{path}: the {self.kind} exists, but its import failed{_where(error)}. "
                f"Got {type(error).__name__}: {' '.join(str(error).split())}. "
                "Fix: correct the module, or install the package that it imports"
            ) from error

    def load(self, name: str) -> ModuleType:
        """Return the module of a plug-in, by its name or by the import path of a module.

        Raises `error`, with a suggestion, if there is no such module, if its import fails, and if
        it does not define `attributes`.
        """
        module = self.find(name)
        if module is None:
            advice = suggest(name, self.names())
            if self.example and {".", "/"} & set(name):
                advice += f"; one of your own is given by its module's path, e.g. {self.example}"
            elif self.package is not None and not self._module_names():
                advice += f". Fix: run this where the folder {self.package}/ is"
            raise self.error(f"there is no {self.kind} {name!r}{advice}")
        missing = [attribute for attribute in self.attributes if not hasattr(module, attribute)]
        if missing:
            raise self.error(
                f"{module.__name__}: the module is not a {self.kind}, because it does not define "
                f"{', '.join(missing)}{self._fix()}"
            )
        return module

    def load_class(self, name: str) -> type[Any]:
        """Return the config class of a plug-in, by its name or by the import path of its module.

        Raises `error` as `load` does, and if the module does not hold exactly one such class.
        """
        module = self.load(name)
        classes = self._classes(module)
        if len(classes) != 1:
            held = ", ".join(cls.__name__ for cls in classes) or "none"
            raise self.error(
                f"{module.__name__}: the module is not a {self.kind}. Got {held}; expected one "
                f"public config class with {' and '.join(self.methods)}{self._fix()}"
            )
        return classes[0]

    def _path(self, name: str) -> str:
        if self.package is None or "." in name:
            return name
        return f"{self.package}.{name.replace('-', '_')}"

    def _module_names(self) -> list[str]:
        if self.package is None:
            return []
        try:
            paths = import_module(self.package).__path__
        except ModuleNotFoundError as error:
            if error.name != self.package:
                raise
            return []  # a package of the working directory, which is somewhere else
        return sorted(m.name for m in pkgutil.iter_modules(paths) if not m.name.startswith("_"))

    def _holds(self, module: ModuleType) -> bool:
        defined = all(hasattr(module, attribute) for attribute in self.attributes)
        return defined and (not self.methods or bool(self._classes(module)))

    def _classes(self, module: ModuleType) -> list[type[Any]]:
        """Return the public config classes with `methods` that the module itself defines."""
        return [
            cls
            for name, cls in vars(module).items()
            if isinstance(cls, type) and is_dataclass(cls) and cls.__module__ == module.__name__
            if not name.startswith("_") and not inspect.isabstract(cls)
            if all(hasattr(cls, method) for method in self.methods)
        ]

    def _fix(self) -> str:
        return f". Fix: see {self.hint}" if self.hint else ""


def _where(error: Exception) -> str:
    """Return the file and line at which an import failed, outside Python's own import system."""
    frames = [f for f in extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    last = next((f for f in reversed(frames) if f.filename not in _IMPORT_FILES), None)
    return f" in {last.filename}, line {last.lineno}" if last else ""


_IMPORT_FILES = (__file__, str(inspect.getsourcefile(import_module)))
