"""The repository as its tests see it: its files, its syntax trees, and which layer a module of the package lies in."""

import ast
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "bridgework"

# The layers of docs/design.md: a module imports from its own layer and from those below it.
LAYERS = (
    (
        "__init__",
        "errors",
        "mixture",
        "config",
        "old_names",
        "plugins",
        "storage",
        "system",
        "tracking.tracker",
    ),
    ("models", "losses", "data", "ray_metrics", "ray_utils", "rng"),
    (
        "artifacts",
        "curation",
        "evaluation",
        "inference",
        "training",
        "tracking.card",
        "tracking.environment",
        "tracking.evaluations",
        "tracking.openlineage_events",
        "tracking.relay",
    ),
    ("recipes", "tracking", "hf"),
    ("tuning", "serving"),
    ("api", "cli", "reproduction"),
)


@cache
def files() -> tuple[Path, ...]:
    """What git would hold: everything but .git and the patterns of .gitignore."""
    ignored = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split())]

    def kept(name: str) -> bool:
        return not any(fnmatch(name, pattern) for pattern in ignored)

    found: list[Path] = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(filter(kept, folders))
        found += [Path(folder, name) for name in sorted(filter(kept, names))]
    return tuple(found)


def python() -> tuple[Path, ...]:
    return tuple(path for path in files() if path.suffix == ".py")


def package() -> tuple[Path, ...]:
    return tuple(path for path in python() if path.is_relative_to(PACKAGE))


def texts() -> Iterator[tuple[Path, str]]:
    """Every file that is text, with its text."""
    for path in files():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    """The path as a reader of a failure wants it."""
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, those inside functions too.

    The package's own `__init__` is left out: its names are for type checkers, and load on first use.
    """
    if path == PACKAGE / "__init__.py":
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def imports_by_string(path: Path) -> Iterator[tuple[int, str]]:
    """The same for `import_module("...")`: how a recipe resolves by name, and no way round a door."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
            yield from (
                (node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant)
            )


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[: -node.level]
    return ".".join((*package, *(node.module or "").split("."))).rstrip(".")


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def dotted(path: Path) -> str:
    """`platform/bridgework/models/vision.py` -> `bridgework.models.vision`."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def part(module: str) -> str:
    """Return the part of a module: `models` for bridgework.models.vision, `__init__` for the package."""
    parts = module.split(".")[1:]
    known = {name for layer in LAYERS for name in layer}
    names = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    return next((name for name in names if name in known), "__init__")


def part_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if path.name == "__init__.py" else part(".".join(("bridgework", *parts)))


def layer(part_name: str) -> int:
    for depth, parts in enumerate(LAYERS):
        if part_name in parts:
            return depth
    raise LookupError(f"{part_name} is in no layer: name it in LAYERS and in docs/design.md")
