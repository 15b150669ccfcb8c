"""KEY=VALUE words of the command line."""

from typing import Any

from bridgework.errors import SpecError


def pairs(words: list[str] | None, example: str) -> dict[str, Any]:
    """The words as a mapping. Raises SpecError, with `example`, for one without `=`."""
    read = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise SpecError(f"{word!r} is not of the form KEY=VALUE, e.g. {example}")
        read[key.strip()] = value
    return read


def changes(words: list[str] | None) -> dict[str, Any]:
    """What `--set` was told, for `spec.override`."""
    return pairs(words, "--set stages.align.optim.peak_lr=3e-4")
