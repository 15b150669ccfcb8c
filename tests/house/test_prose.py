"""Plain technical English: words that a reader of the field would have to translate are not used."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.house import measures, source

WORDS = re.compile(
    r"\b(?:beside|behind|stands|told|tells|anew|nobody|dear|dearest|mend(?:s|ed|ing)?|put aside|for ever)\b",
    re.IGNORECASE,
)
ALLOWED = (
    "behind an",  # a reverse proxy
    "stands for",
    "stands in for",
    "stands in the",  # in captions that a template writes
)
FIRST = re.compile(r"(?:What|Whether|How|Where|Of|Which)\b")
CODE = re.compile(r"`[^`]*`|\"[^\"]*\"|'[^']*'")


def prose() -> Iterator[tuple[str, str]]:
    """Yield (file, text) of every docstring, comment and document, without code and quotations."""
    for path in source.package():
        for text in measures.prose_of(path):
            yield source.name(path), CODE.sub("", text)
    for path in source.files():
        if path.suffix == ".md":
            yield source.name(path), CODE.sub("", measures.prose_of_document(path))


def test_private_words_are_not_used() -> None:
    found = [
        f"{name}: .. {text[max(0, match.start() - 30) : match.end() + 30]!r}"
        for name, text in prose()
        for match in WORDS.finditer(text)
        if not text[match.start() :].lower().startswith(ALLOWED)
    ]
    assert not found, "\n".join(found)


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = [
        f"{source.name(path)}: {doc.splitlines()[0]}"
        for path in source.package()
        for node in ast.walk(source.tree(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for doc in [ast.get_docstring(node) or ""]
        if FIRST.match(doc)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["the row beside it", "what nobody reads", "it was put aside"])
def test_the_pattern_finds_private_words(text: str) -> None:
    assert WORDS.search(text)
