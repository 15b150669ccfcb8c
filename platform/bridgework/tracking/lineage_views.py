"""Views of a lineage graph: a tree for the terminal, JSON, and one self-contained HTML page."""

from collections import defaultdict
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from rich.text import Text
from rich.tree import Tree

from bridgework.tracking.lineage import Lineage, Node

WIDTH, HEIGHT = 210, 44  # pixels of a box
GAP_X, GAP_Y = 60, 14  # pixels between boxes
MAX_LETTERS = 24  # of a line in a box


def tree(graph: Lineage) -> Tree:
    """Return the graph as a tree: a node that occurs again refers to its first place."""
    root = Tree("", hide_root=True)
    below, printed = _below(graph), set[str]()
    for key in graph.roots:
        _grow(root, graph, key, below, printed)
    return root


def _grow(
    at: Tree, graph: Lineage, key: str, below: dict[str, list[str]], printed: set[str]
) -> None:
    node = graph.nodes[key]
    if key in printed:
        at.add(_line(node.title, node.name, "see above"))
        return
    printed.add(key)
    branch = at.add(_line(node.title, node.name, *node.about))
    for title, text in node.facts:
        branch.add(_line(title, text))
    for child in below[key]:
        _grow(branch, graph, child, below, printed)


def _line(title: str, name: str, *about: str) -> Text:
    """Return a node's line as plain text, because external names must not be parsed as markup."""
    return Text.assemble((f"{title} ", "bold"), name, *[(f"  {a}", "dim") for a in about])


def to_json(graph: Lineage) -> dict[str, Any]:
    """Return the graph as JSON values: `nodes` by key, `roots`, and `edges` as pairs of keys."""
    return {
        "subject": graph.subject,
        "direction": graph.direction,
        "roots": graph.roots,
        "nodes": {
            key: {
                "kind": node.kind,
                "id": node.id,
                "title": node.title,
                "name": node.name,
                "about": list(node.about),
                "facts": dict(node.facts),
            }
            for key, node in graph.nodes.items()
        },
        "edges": [list(edge) for edge in graph.edges],
    }


def page(graph: Lineage) -> str:
    """Return one HTML document with the drawn graph and the facts of every node.

    It has no script and makes no requests; all texts are escaped.
    """
    html = files("bridgework.tracking").joinpath("lineage.html").read_text(encoding="utf-8")
    number = {key: f"n{i}" for i, key in enumerate(graph.nodes)}
    return Template(html).substitute(
        title=escape(f"Lineage of {graph.subject}"),
        direction=escape(graph.direction),
        graph=_svg(graph, number),
        nodes="\n".join(_article(node, number[key]) for key, node in graph.nodes.items()),
    )


def _svg(graph: Lineage, number: dict[str, str]) -> str:
    places = _layout(graph)
    columns = 1 + max((x for x, _ in places.values()), default=0)
    rows = 1 + max((y for _, y in places.values()), default=0)
    width, height = columns * (WIDTH + GAP_X), rows * (HEIGHT + GAP_Y)
    lines = []
    for start, end in graph.edges:
        (x1, y1), (x2, y2) = _pixels(places[start]), _pixels(places[end])
        x1, y1, y2 = x1 + WIDTH, y1 + HEIGHT // 2, y2 + HEIGHT // 2
        middle = (x1 + x2) // 2
        lines.append(f'<path d="M{x1},{y1} C{middle},{y1} {middle},{y2} {x2},{y2}"/>')
    boxes = []
    for key, node in graph.nodes.items():
        x, y = _pixels(places[key])
        boxes.append(
            f'<a href="#{number[key]}"><g class="{escape(node.kind)}">'
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
            f'<text x="{x + 10}" y="{y + 18}" class="title">{_short(node.title)}</text>'
            f'<text x="{x + 10}" y="{y + 35}">{_short(node.name)}</text></g></a>'
        )
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
        f"{''.join(lines)}{''.join(boxes)}</svg>"
    )


def _layout(graph: Lineage) -> dict[str, tuple[int, int]]:
    """Return (column, row) of every node: the column is the longest way from a root."""
    below = _below(graph)
    column: dict[str, int] = {}

    def place(key: str, depth: int, way: frozenset[str]) -> None:
        if key in way or column.get(key, -1) >= depth:  # equal weights may form a circle
            return
        column[key] = depth
        for child in below[key]:
            place(child, depth + 1, way | {key})

    for root in graph.roots:
        place(root, 0, frozenset())
    rows: dict[int, int] = defaultdict(int)
    places = {}
    for key in graph.nodes:
        at = column.get(key, 0)
        places[key] = (at, rows[at])
        rows[at] += 1
    return places


def _pixels(place: tuple[int, int]) -> tuple[int, int]:
    column, row = place
    return column * (WIDTH + GAP_X) + GAP_X // 2, row * (HEIGHT + GAP_Y) + GAP_Y // 2


def _short(text: str) -> str:
    return escape(text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 2] + "..")


def _article(node: Node, number: str) -> str:
    facts = "".join(
        f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for title, text in node.facts
    )
    about = escape("  ".join(node.about))
    return (
        f'<article id="{number}" class="{escape(node.kind)}"><h2>{escape(node.title)} '
        f"<code>{escape(node.name)}</code></h2><p>{about}</p><dl>{facts}</dl></article>"
    )


def _below(graph: Lineage) -> dict[str, list[str]]:
    below: dict[str, list[str]] = defaultdict(list)
    for start, end in graph.edges:
        below[start].append(end)
    return below
