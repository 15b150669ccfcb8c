"""What the documents say to type can be typed, and what they point at is there."""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.house import source

DOCUMENTS = [path for path in source.files() if path.suffix == ".md"]
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
JOB = "python -m "


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words) of every line in a ```sh block; a backslash continues a line, a variable in front is left out."""
    for path in DOCUMENTS:
        for block in BLOCK.findall(path.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield f"{source.name(path)}: {line.strip()}", words


def page_commands() -> Iterator[tuple[str, list[str]]]:
    """The same for the commands in the docstrings of the recipes and the thin programs, `command   what it does`."""
    for path in source.python():
        if source.name(path).startswith(
            ("platform/bridgework/recipes/", "jobs/", "serve_apps/", "tune_spaces/")
        ):
            for line in path.read_text(encoding="utf-8").splitlines():
                if re.match(r"(bridgework|python -m) \w", line):
                    command = re.split(r"\s{2,}", line)[0]
                    yield f"{source.name(path)}: {command}", shlex.split(command)


def parse(words: list[str]) -> None:
    """Parse as the command line would, without running anything. Raises what its parser raises."""
    command: Any = typer.main.get_command(import_module("bridgework.cli").app)
    rest = list(words)
    with suppress(typer.Exit):  # --help
        context = command.make_context("bridgework", list(rest))
        while hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(context, rest)
            context = command.make_context(name, list(rest), parent=context)


def test_every_bridgework_command_parses() -> None:
    for where, words in [*commands(), *page_commands()]:
        if words[0] == "bridgework":
            try:
                parse(words[1:])
            except Exception as error:
                pytest.fail(f"{where}\n{type(error).__name__}: {error}")


def named_commands() -> Iterator[tuple[str, str, str]]:
    """(where, command, next word) of every `bridgework COMMAND` in the prose, help, messages and comments."""
    for path, text in source.texts():
        if path.suffix in (".py", ".md") and not path.is_relative_to(source.ROOT / "tests"):
            for number, line in enumerate(text.splitlines(), 1):
                for command, then in re.findall(r"[`'\"]bridgework ([a-z]+)(?: +([a-z-]+))?", line):
                    yield f"{source.name(path)}:{number}", command, then


def test_every_command_named_in_a_sentence_exists() -> None:
    root: Any = typer.main.get_command(import_module("bridgework.cli").app)
    found = list(named_commands())
    assert found
    for where, command, then in found:
        assert command in root.commands, f"{where}: there is no `bridgework {command}`"
        subcommands = getattr(root.commands[command], "commands", None)
        if subcommands is not None and then:
            assert then in subcommands, f"{where}: there is no `bridgework {command} {then}`"


def test_every_program_started_by_module_exists() -> None:
    for where, words in [*commands(), *page_commands()]:
        line = " ".join(words)
        if JOB in line:
            module = line.split(JOB)[1].split()[0]
            path = source.ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), where


def test_every_make_target_exists() -> None:
    makefile = (source.ROOT / "Makefile").read_text(encoding="utf-8")
    for where, words in commands():
        if words[0] == "make":
            for target in (w for w in words[1:] if "=" not in w):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), where


def test_json_on_a_command_line_is_json() -> None:
    for where, words in commands():
        for flag, value in pairwise(words):
            if flag.startswith("--") and flag.endswith("-json"):
                assert isinstance(json.loads(value), dict), where


def test_the_readme_tests_with_what_continuous_integration_runs() -> None:
    runs = [
        line
        for line in (source.ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
        if "make" in line
    ]
    assert runs == ["exec make test"]
    assert ["make", "test"] in [
        words for where, words in commands() if where.startswith("README.md")
    ]


def anchors(path: Path) -> set[str]:
    """GitHub's names for the headings of a document."""
    headings = re.findall(r"^#+ +(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=source.name)
def test_every_link_resolves(path: Path) -> None:
    for link in filter(None, chain.from_iterable(LINK.findall(path.read_text(encoding="utf-8")))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{source.name(path)} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), (
                f"{source.name(path)} links to {link}: no such heading"
            )


TOPS = {path.name for folder in (source.ROOT, source.PACKAGE) for path in folder.iterdir()}


def test_every_module_named_in_the_documents_exists() -> None:
    missing = [
        f"{source.name(path)}: {name}"
        for path in DOCUMENTS
        if path.name not in ("CHANGELOG.md", "log.md")  # they name what was
        for name in re.findall(r"`([a-z_]+/[a-z_/]*)`", path.read_text(encoding="utf-8"))
        if name.partition("/")[0] in TOPS
        if not any(
            (folder / name).exists() or (folder / f"{name}.py").exists()
            for folder in (source.ROOT, source.PACKAGE)
        )
    ]
    assert not missing, "\n".join(missing)
