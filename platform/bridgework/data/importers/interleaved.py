"""Documents of texts and images in reading order: web pages, or JSON of MMC4's or OBELICS's form.

MMC4      {"text_list": [..], "image_info": [{"image_name", "matched_text_index"}]}    (arXiv:2304.06939)
OBELICS   {"texts": [.. or null], "images": [.. or null]}, place by place              (arXiv:2306.16527)

Images that say nothing are dropped, and documents without an image left are left out, as in Flamingo's M3W (Alayrac et
al. 2022, arXiv:2204.14198, appendix A).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from posixpath import dirname, join, normpath
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

from bridgework.data.importers import PLACEHOLDER, Say, address, fingerprint, ingest, read_image, read_text
from bridgework.data.pages import pieces
from bridgework.data.pieces import Piece, mmc4, obelics
from bridgework.data.quarantine import SHARE, BadSample, LeftOut, Reason
from bridgework.data.samples import Part, Sample
from bridgework.data.shards import Manifest
from bridgework.data.sources import fields, files, hidden, parent, rows
from bridgework.data.transforms import decode, size_of
from bridgework.errors import DataError

PAGES = (".html", ".htm", ".xhtml", ".xht")
OTHER_PAGES = (".mhtml", ".mht", ".shtml", ".webarchive", ".maff", ".warc", ".php", ".asp", ".aspx", ".jsp", ".pdf")
TABLES = (".jsonl", ".json")
_REMOTE = "remote"  # of an image that is at an address, `data:` and `file:` among them
_SPACES = re.compile(r"[^\S\n]+")


class Rule(NamedTuple):
    """What an image must be to stay."""

    min_side: int  # pixels
    max_aspect: float  # the long side over the short one


class Content(NamedTuple):
    """What a document holds, its images by name, and where it comes from."""

    pieces: list[Piece]
    provenance: dict[str, str]


Bands = tuple[tuple[int, int], ...]  # the least and the greatest value of each channel
Document = tuple[str, Callable[[], Content]]  # a key, and what reads it or raises BadSample


def run(
    source: str,
    dest: str,
    *,
    images: str | None = None,
    min_side: int = 64,
    max_aspect: float = 3.0,
    licence: str = "unknown",
    max_bad: float = SHARE,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Import the pages of the folder `source`, or the documents of the .jsonl or .json file `source`.

    Pages name their images by paths inside the folder, JSON inside the folder `images`, by default the file's own; what
    lies elsewhere is never fetched. An image with a side of less than `min_side` pixels, longer than `max_aspect` times
    its width or the other way round, of a single colour, or not to be read, is dropped: `dropped.small` and so on in a
    row's provenance count them. A document without a text is left out and counted, and so is one without an image left;
    if what it lacks are images that cannot be read, it is a bad row.
    """
    if not min_side >= 0 or not max_aspect >= 1:
        raise DataError(
            f"min_side={min_side} max_aspect={max_aspect}: a side is 0 pixels or more, and the long one at least "
            "1 times the short one; give such numbers"
        )
    if source.endswith(TABLES):
        content, folder = read_text(source), parent(source) if images is None else images
        documents = partial(_listed, content, source)
    elif images is not None:
        raise DataError(f"images={images} goes with a .jsonl or .json file; the pages of {source} name theirs")
    else:
        found, folder = files(source), source
        content, documents = json.dumps(found), partial(_pages, source, [name for name, _ in found])
    rule = Rule(min_side, max_aspect)
    return ingest(
        lambda: ((key, partial(_sample, key, read, folder, rule)) for key, read in documents()),
        source,
        dest,
        licence=licence,
        made_by=__name__,
        parameters={"images": images, "sha256": fingerprint(content), **rule._asdict()},
        max_bad=max_bad,
        workers=workers,
        say=say,
    )


# --- what becomes of a document --------------------------------------------------------------------------------------


def _sample(key: str, read: Callable[[], Content], folder: str, rule: Rule) -> Sample:
    told, dropped, broken = read(), Counter[str](), list[BadSample]()
    if not any(piece.text.strip() for piece in told.pieces):
        raise LeftOut("documents without a text")
    images, parts, texts = list[bytes](), list[Part](), list[Piece]()
    for piece in told.pieces:
        if piece.image is None:
            texts.append(piece)
            continue
        data = _any_image(folder, (piece.image, *piece.others), rule)
        if isinstance(data, _Unfit):
            dropped[str(data)] += 1
            continue
        if isinstance(data, BadSample):
            dropped[data.reason.value] += 1
            broken.append(data)
            continue
        parts += [*_joined(texts), Part("caption", image=len(images))]
        images.append(data)
        texts = []
    if broken and not images:
        raise BadSample(broken[0].reason, f"none of its images can be used: {broken[0].detail}")
    if not images:
        raise LeftOut("documents without an image")
    parts += _joined(texts)
    counts = {f"dropped.{why}": str(number) for why, number in sorted(dropped.items())}
    return Sample(key, tuple(images), tuple(parts), provenance={**told.provenance, **counts})


def _joined(texts: Iterable[Piece]) -> list[Part]:
    """The texts between two images as one: a line a block."""
    blocks = ("".join(piece.text for piece in block) for _, block in groupby(texts, key=lambda piece: piece.block))
    text = "\n".join(filter(None, (_SPACES.sub(" ", block).strip() for block in blocks)))
    if PLACEHOLDER in text:
        raise BadSample(Reason.PLACEHOLDERS, f"a text holds {PLACEHOLDER!r}")
    return [Part("caption", text=text)] if text else []


class _Unfit(Exception):
    """What an image is that says nothing."""


def _any_image(folder: str, names: Iterable[str], rule: Rule) -> "bytes | _Unfit | BadSample":
    """The first of an image's names that can be used, or why there is none: a flaw before its being elsewhere."""
    flaws = list[_Unfit | BadSample]()
    for name in names:
        try:
            return _image(folder, name, rule)
        except (_Unfit, BadSample) as why:
            flaws.append(why)
    return next((flaw for flaw in flaws if str(flaw) != _REMOTE), flaws[0])


def _image(folder: str, name: str, rule: Rule) -> bytes:
    """Raises BadSample for an image that cannot be read, _Unfit for one that is not wanted."""
    if address(name):
        raise _Unfit(_REMOTE)
    data = read_image(folder, name)
    short, long = sorted(size_of(data))
    if short < rule.min_side:
        raise _Unfit("small")
    if long > rule.max_aspect * short:
        raise _Unfit("aspect")
    if all(low == high for low, high in cast(Bands, decode(data).getextrema())):
        raise _Unfit("flat")
    return data


# --- where documents come from ---------------------------------------------------------------------------------------


def _pages(source: str, names: list[str]) -> Iterator[Document]:
    """The pages of a folder; after them those that are not read, to be counted."""
    pages = [name for name in names if name.lower().endswith((*PAGES, *OTHER_PAGES))]
    read = [name for name in pages if name.lower().endswith(PAGES) and not hidden(name)]
    yield from ((name, partial(_page, source, name)) for name in read)
    for name in sorted({*pages} - {*read}):
        ending = name.lower().rpartition(".")[2]
        yield name, partial(_unread, "hidden files" if hidden(name) else f"pages of .{ending}")


def _unread(what: str) -> Content:
    raise LeftOut(what)


def _page(source: str, name: str) -> Content:
    found = pieces(read_image(source, name))
    return Content([p if p.image is None else _placed(name, p.image, *p.others) for p in found], {})


def _placed(page: str, *names: str) -> Piece:
    first, *others = (_inside(page, name) for name in names)
    return Piece(image=first, others=tuple(others))


def _inside(page: str, source: str) -> str:
    """The path, inside the folder of pages, of an image that a page names; what is no path is given back."""
    path = unquote(re.split(r"[?#]", source.strip())[0])
    return source if address(source) else normpath(join(dirname(page), path))


def _listed(text: str, source: str) -> Iterator[Document]:
    return ((f"row-{number:08d}", partial(_entry, entry)) for number, entry in enumerate(rows(text, source)))


def _entry(entry: Any) -> Content:
    given = fields(entry)
    told = {"url": given["url"]} if isinstance(given.get("url"), str) else {}
    return Content(list(mmc4(given) if "text_list" in given else obelics(given)), told)
