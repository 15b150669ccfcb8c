"""The shape of the code: sizes that a reader can hold, nothing left undone, no system treated by name."""

import ast
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import source

P90_FILE, P90_FUNCTION = 500, 50  # lines
# Each pattern is written so that it does not match itself.
UNDONE = re.compile(r"\bTO[D]O\b|\bFIX[M]E\b|\bNotImplemented[E]rror\b|\btype:\s*ignor[e]\b")
MACHINE = re.compile(
    r"(?<![\w.~$}/-])/(?:wor[k]|roo[t]|home/\w+|Users/\w+|tmp/b[w])(?=[/\s'\"`)]|$)"  # a path of one machine
    r"|(?:index-ur[l]|find-link[s])[= ]+['\"]?(?:https?|file):"  # a package index of one network
    r"|https?://[\w.-]*(?:mirro[r]|artifactor[y]|nexu[s]|prox[y])[\w.-]*"
)


def matches(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{source.name(path)}:{number} {line.strip()[:100]}"
        for path, text in source.texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(source.tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_nine_of_ten_files_and_functions_are_read_in_one_sitting() -> None:
    files = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in source.python())
    lengths = sorted(
        (node.end_lineno or node.lineno) - node.lineno + 1 for path in source.python() for node in functions(path)
    )
    assert files[int(len(files) * 0.9)] <= P90_FILE
    assert lengths[int(len(lengths) * 0.9)] <= P90_FUNCTION


def test_every_parameter_and_result_is_annotated() -> None:
    bare = [
        f"{source.name(path)}:{node.lineno} {node.name}"
        for path in source.python()
        for node in functions(path)
        for a in [node.args]
        for given in [[*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]]
        if node.returns is None or any(p.annotation is None and p.arg not in ("self", "cls") for p in given)
    ]
    assert not bare, "\n".join(bare)


def test_nothing_is_left_undone() -> None:
    assert not (found := matches(UNDONE)), "\n".join(found)


def test_no_file_knows_one_machine() -> None:
    assert not (found := matches(MACHINE)), "\n".join(found)


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (UNDONE, "# TO" + "DO: later"),
        (UNDONE, "x = f()  # type: ig" + "nore[arg-type]"),
        (MACHINE, "HOME = '/ro" + "ot/cache'"),
        (MACHINE, "--index-" + "url https://pypi.example.org/simple"),
    ],
)
def test_the_patterns_find_what_they_look_for(pattern: re.Pattern[str], line: str) -> None:
    assert pattern.search(line)


def test_the_source_root_is_not_a_package() -> None:
    assert not (source.ROOT / "platform" / "__init__.py").exists(), "it shadows Python's own module `platform`"


def test_import_platform_is_pythons_own() -> None:
    code = "import platform; print(platform.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=source.ROOT, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()).resolve().parent == Path(sysconfig.get_path("stdlib")).resolve()


def _strings(node: ast.expr) -> set[str]:
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)}


def _is_a_name(node: ast.expr) -> bool:
    """`stage.name`, `system.name`, `stage_name`; not `os.name`."""
    if isinstance(node, ast.Attribute):
        return node.attr == "name" and not (isinstance(node.value, ast.Name) and node.value.id == "os")
    return isinstance(node, ast.Name) and node.id in ("stage", "system", "stage_name", "system_name", "recipe")


def by_name(tree: ast.AST) -> Iterator[tuple[int, set[str]]]:
    """(line, strings) wherever something's name is compared with, or matched against, a string that is no file name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(map(_is_a_name, (node.left, *node.comparators))):
            strings = set().union(*map(_strings, (node.left, *node.comparators)))
        elif isinstance(node, ast.Match) and _is_a_name(node.subject):
            strings = set().union(*(_strings(v) for v in ast.walk(node) if isinstance(v, ast.Constant)))
        else:
            continue
        if words := {s for s in strings if s.isidentifier()}:
            yield node.lineno, words


def test_nothing_branches_on_the_name_of_a_system_or_a_stage() -> None:
    branches = [
        f"{source.name(path)}:{line} compares a name with {', '.join(sorted(words))}"
        for path in source.package()
        for line, words in by_name(source.tree(path))
    ]
    assert not branches, "\n".join(branches)


@pytest.mark.parametrize(
    "code",
    ["if stage.name == 'align': ...", "x = 1 if system.name in ('llava',) else 2", "match s.name:\n case 'align': ..."],
)
def test_a_branch_on_a_name_is_seen(code: str) -> None:
    assert list(by_name(ast.parse(code)))
