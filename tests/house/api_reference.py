"""The reference of the public API, written from its docstrings: `python -m tests.house.api_reference`.

tests/house/test_api.py holds docs/api.md against it.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import bridgework
from tests.house import source

FILE = source.ROOT / "docs" / "api.md"
HEAD = """# API

`import bridgework as bw` offers these names. They load on first use: the import alone loads neither torch nor Ray.
This page is written from the docstrings by `python -m tests.house.api_reference`.
"""
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example):$")


def reference() -> str:
    """Return the text of docs/api.md."""
    functions = [name for name in bridgework.__all__ if name[0].islower()]
    classes = [name for name in bridgework.__all__ if name[0].isupper()]
    parts = [HEAD, "## Functions\n"]
    parts += [f"### {name}\n\n{entry(name, getattr(bridgework, name))}" for name in functions]
    parts.append("## Classes\n")
    parts += [f"### {name}\n\n{of_class(name, getattr(bridgework, name))}" for name in classes]
    return "\n".join(parts)


def entry(name: str, function: Any) -> str:
    """One function: its signature and its docstring, sections as lists."""
    signature = f"{name}{inspect.signature(function)}"
    return (
        f"```python\n{shortened(signature)}\n```\n\n"
        + "\n".join(body(inspect.getdoc(function) or ""))
        + "\n"
    )


def of_class(name: str, cls: type) -> str:
    """One class: its docstring, its fields or its constructor's arguments, and its public methods by one line each."""
    lines = [*body(inspect.getdoc(cls) or ""), ""]
    if hasattr(cls, "__dataclass_fields__"):
        lines += [
            f"- `{field.name}: {shortened(str(annotation(field.type)))}`"
            for field in cls.__dataclass_fields__.values()
        ]
    methods = [
        (found, value)
        for found, value in inspect.getmembers(cls, callable)
        if not found.startswith("_") and found in vars(cls) and inspect.getdoc(value)
    ]
    if methods:
        lines += ["", f"Methods of `{name}`:", ""]
        lines += [
            f"- `{found}`: {(inspect.getdoc(value) or '').splitlines()[0]}"
            for found, value in methods
        ]
    return "\n".join(lines) + "\n"


def annotation(given: Any) -> str:
    return given.__name__ if isinstance(given, type) else str(given)


def shortened(text: str) -> str:
    """Without the modules of annotations and with double quotes."""
    text = re.sub(r"\b(?:[a-z_]\w*\.)+([A-Z]\w*)", r"\1", text)
    return text.replace("'", '"')


def body(doc: str) -> Iterator[str]:
    """The lines of a docstring in Markdown: sections in bold, arguments as a list, examples as code."""
    section, code = "", False
    for line in doc.splitlines():
        if found := SECTION.match(line):
            if code:
                yield "```"
                code = False
            section = found[1]
            yield f"**{section}**"
            yield ""
            if section == "Example":
                yield "```python"
                code = True
        elif code:
            yield line.removeprefix("    ")
        elif section and line.startswith("        "):
            yield f"  {line.strip()}"
        elif section and line.strip():
            key, colon, text = line.strip().partition(": ")
            yield f"- `{key}`: {text}" if colon and " " not in key else f"- {line.strip()}"
        else:
            yield line
    if code:
        yield "```"


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
    print(FILE)
