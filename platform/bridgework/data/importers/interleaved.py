"""Documents of texts and images in reading order: web pages, or JSON of MMC4's or OBELICS's form.

MMC4      {"text_list": [..], "image_info": [{"image_name", "matched_text_index"}]}    (arXiv:2304.06939)
OBELICS   {"texts": [.. or null], "images": [.. or null]}, place by place              (arXiv:2306.16527)

Of a page, scripts, styles, menus, and headers and footers outside an article are not read. Images
without content are dropped, and documents without an image left are left out, as in Flamingo's M3W
(Alayrac et al. 2022, arXiv:2204.14198, appendix A).
"""

import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from posixpath import dirname, join, normpath
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
from bs4.element import NavigableString, Tag
from bs4.exceptions import ParserRejectedMarkup

from bridgework.config import config_class
from bridgework.data.images import decode, size_of
from bridgework.data.importers import (
    PLACEHOLDER,
    UNKNOWN,
    Importer,
    Listing,
    Row,
    address,
    fingerprint,
    read_image,
    read_text,
)
from bridgework.data.importers.tables import fields, files, hidden, parent, rows
from bridgework.data.quarantine import BadSample, Reason, SkippedRow
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError


@dataclass(frozen=True)
class Piece:
    """A segment of text, or the place of a named image.

    Neighbors of one `block` are on one line.
    """

    text: str = ""
    image: str | None = None
    block: int = 0
    others: tuple[str, ...] = ()  # names that the image may also have, best first


def mmc4(fields: dict[str, Any]) -> Iterator[Piece]:
    """Yield MMC4's sentences, each after its matched images, which the file lists in another order.

    Raises BadSample for what has not this form.
    """
    texts, shown = fields.get("text_list"), fields.get("image_info")
    if not isinstance(texts, list) or not isinstance(shown, list):
        raise BadSample(Reason.BAD_ROW, "`text_list` or `image_info` is not a list")
    before = defaultdict[int, list[Any]](list)
    for image in shown:
        at = image.get("matched_text_index") if isinstance(image, dict) else None
        if not isinstance(at, int) or not 0 <= at < len(texts):
            raise BadSample(
                Reason.BAD_ROW, f"an image is matched to text {at!r}, and there are {len(texts)}"
            )
        before[at].append(image.get("image_name"))
    for at, text in enumerate(texts):
        yield from (Piece(image=_known(name)) for name in before[at])
        yield Piece(_known(text) + " ")


def obelics(fields: dict[str, Any]) -> Iterator[Piece]:
    """OBELICS' form: texts and images side by side, in each place one of the two.

    Raises BadSample for another.
    """
    texts, shown = fields.get("texts"), fields.get("images")
    if not isinstance(texts, list) or not isinstance(shown, list) or len(texts) != len(shown):
        raise BadSample(
            Reason.BAD_ROW,
            "the row has no `text_list`, and no lists `texts` and `images` of one length",
        )
    for place, (text, name) in enumerate(zip(texts, shown, strict=True)):
        if name is not None:
            yield Piece(image=_known(name))
        if text is not None:
            yield Piece(_known(text), block=place)


def _known(value: Any) -> str:
    if not isinstance(value, str):
        raise BadSample(Reason.BAD_ROW, f"a text or the name of an image is {str(value)[:80]}")
    return value


MAX_TAGS = 50_000  # of a page: each takes the parser 25 microseconds and a kilobyte
_ROOT = re.compile("html|body")
_ARTICLE = re.compile("article|main")
_FRAME = re.compile("header|footer")  # of the site, unless it is that of an article
_UNSEEN = re.compile(
    "head|script|style|noscript|template|iframe|object|svg|canvas|button|select|textarea|nav|menu|dialog"
)
_NAVIGATION = re.compile(  # as an ARIA role, a class or an id
    "nav|navbar|navigation|navheader|navfooter|breadcrumbs?|sidebar|banner|contentinfo|search"
)
_INLINE = re.compile(
    "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|ins|kbd|label|mark|q|s|samp|small|span|strike|strong"
    "|sub|sup|time|tt|u|var"
)
_SPACE = re.compile(r"\s+")
_IMAGES = ("img", "amp-img")
_UNSCRIPTED = re.compile("noscript")  # what is shown where no script runs
# attributes that scripts read, in place of which `src` is a placeholder or missing
_LAZY = re.compile(
    r"(?:data|lazy|ng)-(?:.*-)?(?:src|srcset|original|lazy|lazyload|echo|hires|image|img|url|full|large)(?:-.*)?"
    r"|(?:lazy|real|orig|original)[-_]?(?:src|srcset)"
)
_FILE = re.compile(r"\.(?:avif|bmp|gif|jfif|jpe?g|png|webp)(?:[?#].*)?\s*$", re.IGNORECASE)
_SMALL = re.compile("thumb|small|tiny|low|placeholder|preview")
_SIZE = re.compile(r"\s[\d.]+[wx]\s*(?:,|$)|,\s")  # a list of images for several sizes of a screen
_LISTED = re.compile(r"\s*,*\s*(\S*[^\s,])(?:\s+(\d+(?:\.\d+)?)[wx])?\s*(?:,|$)")
MAX_NAMES = 32  # of an image
MAX_LIST = 20_000  # characters of a list of images


def pieces(page: bytes) -> list[Piece]:
    """The pieces of an HTML page, whose encoding is found out.

    Raises BadSample for what the parser refuses.
    """
    if (tags := page.count(b"<")) > MAX_TAGS:
        raise BadSample(Reason.BAD_ROW, f"the page has {tags} tags; at most {MAX_TAGS} are read")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", XMLParsedAsHTMLWarning
        )  # XHTML is read as what it looks like
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        try:
            return list(_read(BeautifulSoup(page, "lxml")))
        except ParserRejectedMarkup as error:
            raise BadSample(Reason.BAD_ROW, f"the page is not HTML: {error}") from None


class _Place(NamedTuple):
    """The context of an element in a page."""

    shown: bool
    article: bool
    block: (
        Tag  # what sets it off from other texts: a paragraph, a heading, an item of a list, a cell
    )


def _read(soup: BeautifulSoup) -> Iterator[Piece]:
    places = {id(soup): _Place(True, False, soup)}
    block, last = 0, places[id(soup)].block
    for node in soup.descendants:
        around = places[id(node.parent)]
        if isinstance(node, Tag):
            element = node.name
            article = around.article or _ARTICLE.fullmatch(element) is not None
            shown = around.shown and not _is_excluded(node, article)
            places[id(node)] = _Place(
                shown, article, around.block if _INLINE.fullmatch(element) else node
            )
            block += element == "br"
            if shown and element in _IMAGES and (names := _names(node)):
                yield Piece(image=names[0], others=tuple(names[1:]))
        elif (
            around.shown and type(node) is NavigableString
        ):  # comments and declarations are kinds of it
            block += around.block is not last
            last = around.block
            yield Piece(_SPACE.sub(" ", node), block=block)


def _names(image: Tag) -> list[str]:
    """Return the addresses of an image, best first: loaded by scripts, its source, other sizes."""
    around = [image, *_sources(image)]
    lazy = [
        (name, value) for tag in around for name, value in _attributes(tag) if _LAZY.fullmatch(name)
    ]
    lazy.sort(key=lambda pair: _SMALL.search(pair[0]) is not None)
    later = [one for name, value in lazy for one in _sized(value) if _is_file(name, one)]
    own = [value for name, value in _attributes(image) if name == "src"]
    sets = [
        one
        for tag in around
        for name, value in _attributes(tag)
        if name == "srcset"
        for one in _sized(value)
    ]
    unscripted = [value for tag in around[1:] for name, value in _attributes(tag) if name == "src"]
    return list(dict.fromkeys((*later, *own, *unscripted, *sets)))[:MAX_NAMES]


def _sources(image: Tag) -> list[Tag]:
    """Return the sources of a `picture` around an image, and a `noscript`'s images next to it."""
    found = list[Tag]()
    if (picture := image.find_parent("picture")) is not None:
        found += picture.find_all("source")  # the parser puts each into the one before it
    for near in (image.find_next_sibling(), image.find_previous_sibling()):
        if isinstance(near, Tag) and _UNSCRIPTED.fullmatch(near.name):
            found += near.find_all(list(_IMAGES))
    return found


def _attributes(tag: Tag) -> Iterator[tuple[str, str]]:
    for name, value in tag.attrs.items():
        if isinstance(value, str) and value.strip():
            yield name.lower(), value


def _sized(value: str) -> list[str]:
    """Return the names in a list such as `a.jpg 640w, b.jpg 2x`, largest first; or the one name."""
    if len(value) > MAX_LIST or not _SIZE.search(value):
        return [value]
    found = [(url, float(size or 1)) for url, size in _LISTED.findall(value)]
    return [url for url, _ in sorted(found, key=lambda pair: -pair[1])]


def _is_file(name: str, value: str) -> bool:
    """True if the value of a script's attribute names an image, as far as can be seen."""
    given = not _SPACE.search(value.strip()) and ("/" in value or "." in value)
    return given and ("src" in name or _FILE.search(value) is not None)


def _is_excluded(tag: Tag, article: bool) -> bool:
    """Return True for an element that is invisible, or part of the site and not of the document."""
    if _UNSEEN.fullmatch(tag.name) or (_FRAME.fullmatch(tag.name) and not article):
        return True
    words = (tag.get("role"), tag.get("id"), *(tag.get("class") or ()))
    return not _ROOT.fullmatch(tag.name) and any(_NAVIGATION.fullmatch(str(word)) for word in words)


PAGES = (".html", ".htm", ".xhtml", ".xht")
OTHER_PAGES = (
    ".mhtml",
    ".mht",
    ".shtml",
    ".webarchive",
    ".maff",
    ".warc",
    ".php",
    ".asp",
    ".aspx",
    ".jsp",
    ".pdf",
)
TABLES = (".jsonl", ".json")
_REMOTE = "remote"  # of an image that is at an address, `data:` and `file:` among them
_SPACES = re.compile(r"[^\S\n]+")


class Rule(NamedTuple):
    """Limits that an image must keep."""

    min_side: int  # pixels
    max_aspect: float  # the long side over the short one


class Content(NamedTuple):
    """Pieces of a document, with its images by name, and its provenance."""

    pieces: list[Piece]
    provenance: dict[str, str]


Bands = tuple[tuple[int, int], ...]  # the least and the greatest value of each channel
Document = tuple[str, Callable[[], Content]]  # a key, and its reader, which raises BadSample


@config_class
class InterleavedImporter(Importer):
    """Import the pages of a folder SOURCE, or the documents of a .jsonl or .json file SOURCE.

    Pages name their images by paths inside the folder, JSON inside the folder `images`, by default
    the file's own; nothing elsewhere is fetched. An image with a side of less than
    `min_side` pixels, longer than `max_aspect` times its width or the other way round, of a single
    color, or not to be read, is dropped: `dropped.small` and so on in a row's provenance count
    them. A document without a text is left out and counted, and so is one without an image left; if
    what it lacks are images that cannot be read, it is a bad row.
    """

    images: str | None = None
    min_side: int = 64
    max_aspect: float = 3.0
    license: str = UNKNOWN

    def __post_init__(self) -> None:
        if not self.min_side >= 0 or not self.max_aspect >= 1:
            raise DataError(
                f"min_side={self.min_side} max_aspect={self.max_aspect}: a side is 0 pixels or "
                "more, and the long "
                "one at least 1 times the short one; give such numbers"
            )

    def list_rows(self, source: str) -> Listing:
        if source.endswith(TABLES):
            content, folder = read_text(source), parent(source)
            folder = folder if self.images is None else self.images
            documents = partial(_listed, content, source)
        elif self.images is not None:
            raise DataError(
                f"images={self.images} goes with a .jsonl or .json file; the pages of {source} "
                "name theirs"
            )
        else:
            found, folder = files(source), source
            content = json.dumps(found)
            documents = partial(_pages, source, [name for name, _ in found])
        rule = Rule(self.min_side, self.max_aspect)
        return Listing(partial(_rows, documents, folder, rule), fingerprint(content))


def _rows(documents: Callable[[], Iterator[Document]], folder: str, rule: Rule) -> Iterator[Row]:
    return ((key, partial(_sample, key, read, folder, rule)) for key, read in documents())


# --- samples --------------------------------------------------------------------------------------


def _sample(key: str, read: Callable[[], Content], folder: str, rule: Rule) -> Sample:
    content, dropped, broken = read(), Counter[str](), list[BadSample]()
    if not any(piece.text.strip() for piece in content.pieces):
        raise SkippedRow("documents without a text")
    images, parts, texts = list[bytes](), list[Part](), list[Piece]()
    for piece in content.pieces:
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
        raise SkippedRow("documents without an image")
    parts += _joined(texts)
    counts = {f"dropped.{why}": str(number) for why, number in sorted(dropped.items())}
    return Sample(key, tuple(images), tuple(parts), provenance={**content.provenance, **counts})


def _joined(texts: Iterable[Piece]) -> list[Part]:
    """Join the texts between two images: one line per block."""
    blocks = (
        "".join(piece.text for piece in block)
        for _, block in groupby(texts, key=lambda piece: piece.block)
    )
    text = "\n".join(filter(None, (_SPACES.sub(" ", block).strip() for block in blocks)))
    if PLACEHOLDER in text:
        raise BadSample(Reason.PLACEHOLDERS, f"a text holds {PLACEHOLDER!r}")
    return [Part("caption", text=text)] if text else []


class _Unfit(Exception):
    """The reason to drop an image."""


def _any_image(folder: str, names: Iterable[str], rule: Rule) -> "bytes | _Unfit | BadSample":
    """Read the first usable name of an image.

    Returns the reason if there is none, `remote` last.
    """
    flaws = list[_Unfit | BadSample]()
    for name in names:
        try:
            return _image(folder, name, rule)
        except (_Unfit, BadSample) as why:
            flaws.append(why)
    return next((flaw for flaw in flaws if str(flaw) != _REMOTE), flaws[0])


def _image(folder: str, name: str, rule: Rule) -> bytes:
    """Read an image. Raises BadSample if it cannot be read, _Unfit for one to drop."""
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


# --- documents ------------------------------------------------------------------------------------


def _pages(source: str, names: list[str]) -> Iterator[Document]:
    """Yield the pages of a folder, then those that are not read, which are counted."""
    pages = [name for name in names if name.lower().endswith((*PAGES, *OTHER_PAGES))]
    read = [name for name in pages if name.lower().endswith(PAGES) and not hidden(name)]
    yield from ((name, partial(_page, source, name)) for name in read)
    for name in sorted({*pages} - {*read}):
        ending = name.lower().rpartition(".")[2]
        yield name, partial(_unread, "hidden files" if hidden(name) else f"pages of .{ending}")


def _unread(what: str) -> Content:
    raise SkippedRow(what)


def _page(source: str, name: str) -> Content:
    found = pieces(read_image(source, name))
    return Content([p if p.image is None else _placed(name, p.image, *p.others) for p in found], {})


def _placed(page: str, *names: str) -> Piece:
    first, *others = (_inside(page, name) for name in names)
    return Piece(image=first, others=tuple(others))


def _inside(page: str, source: str) -> str:
    """Return the path of an image in the folder of pages; a URL is returned unchanged."""
    path = unquote(re.split(r"[?#]", source.strip())[0])
    return source if address(source) else normpath(join(dirname(page), path))


def _listed(text: str, source: str) -> Iterator[Document]:
    return (
        (f"row-{number:08d}", partial(_entry, entry))
        for number, entry in enumerate(rows(text, source))
    )


def _entry(entry: Any) -> Content:
    given = fields(entry)
    origin = {"url": given["url"]} if isinstance(given.get("url"), str) else {}
    return Content(list(mmc4(given) if "text_list" in given else obelics(given)), origin)
