"""Measures of the package as a text: sizes, cycles and words. `python -m tests.house.measures` prints them.

They are read by people and by tests/house/test_shape.py; words are counted per 10,000 words of docstrings, comments
and documents.
"""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.house import source

WORDS = (
    "what", "stands", "lies", "beside", "behind", "whole", "nobody", "anew", "told", "tells",
    "because", "e.g.", "default", "returns", "raises",
)  # fmt: skip
NO_CODE = re.compile(r"""\s*(?:#|$|[rfb]{0,2}"[^"]*"[,)]*$|"(?:[^"\\]|\\.)*": "[^"]*",$)""")


def percentile(values: Sequence[int], share: float) -> int:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def code_lines(path: Path) -> list[str]:
    """Lines that hold code: no blanks, comments, docstrings, or lines that are one string literal."""
    text = path.read_text(encoding="utf-8")
    prose = {
        line for first, last in _docstrings(source.tree(path)) for line in range(first, last + 1)
    }
    lines = enumerate(text.splitlines(), 1)
    return [line for number, line in lines if number not in prose and not NO_CODE.match(line)]


def function_lengths(path: Path) -> list[int]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [
        (n.end_lineno or n.lineno) - n.lineno + 1
        for n in ast.walk(source.tree(path))
        if isinstance(n, kinds)
    ]


def comments(path: Path) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return [t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT]


def prose() -> Iterator[str]:
    """Yield every docstring and comment of the package, and every document."""
    for path in source.package():
        yield from prose_of(path)
    for path in source.files():
        if path.suffix == ".md":
            yield prose_of_document(path)


def prose_of(path: Path) -> Iterator[str]:
    """Yield the docstrings and comments of a module."""
    yield from comments(path)
    for node in ast.walk(source.tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def prose_of_document(path: Path) -> str:
    """Return a document without its blocks of code."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that import each other, directly or through others (Tarjan's strongly connected components)."""
    found: list[list[str]] = []
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for there in sorted(edges.get(name, ())):
            if there not in index:
                visit(there)
                low[name] = min(low[name], low[there])
            elif there in stack:
                low[name] = min(low[name], index[there])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(edges):
        if name not in index:
            visit(name)
    return found


def package_edges() -> dict[str, set[str]]:
    """Which parts of the package (folders, or modules at its top) import which, for type checking too."""
    edges: dict[str, set[str]] = {}
    for path in source.package():
        here = source.part_of(path)
        for _, module in source.imports(path):
            if module.split(".")[0] == "bridgework" and (there := source.part(module)) != here:
                edges.setdefault(here, set()).add(there)
    return edges


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, int]]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
        ):
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first.lineno, first.end_lineno or first.lineno


def main() -> None:
    files = source.package()
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
    functions = [n for path in files for n in function_lengths(path)]
    code = [line for path in files for line in code_lines(path)]
    notes = sum(len(comments(path)) for path in files)
    print(f"files {len(files)}, lines of code {len(code):,}")
    for what, values in (("file lines", lengths), ("function lines", functions)):
        print(
            f"{what}: median {percentile(values, 0.5)}, p90 {percentile(values, 0.9)}, max {max(values)}"
        )
    print(
        f"functions {len(functions):,}, comments per 100 lines of code {100 * notes / len(code):.1f}"
    )
    print(
        f"code over 100 characters {100 * sum(len(line) > 100 for line in code) / len(code):.1f} %"
    )
    print(f"cycles between packages: {cycles(package_edges()) or 'none'}")
    words = [word for text in prose() for word in re.findall(r"[a-z.']+", text.lower())]
    counts = Counter(word if word == "e.g." else word.strip(".'") for word in words)
    print(f"words of prose {len(words):,}; per 10,000:")
    print("  " + ", ".join(f"{word} {10_000 * counts[word] / len(words):.1f}" for word in WORDS))


if __name__ == "__main__":
    main()
