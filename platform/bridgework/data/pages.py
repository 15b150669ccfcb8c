"""A web page as a document: its texts and the names of its images, in the order in which they are read.

What is on every page of a site is no part of it: scripts, styles, menus, and headers and footers outside an article.
"""

import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
from bs4.element import NavigableString, Tag
from bs4.exceptions import ParserRejectedMarkup

from bridgework.data.pieces import Piece
from bridgework.data.quarantine import BadSample, Reason

MAX_TAGS = 50_000  # of a page: each takes the parser 25 microseconds and a kilobyte
_WHOLE = re.compile("html|body")
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
_LAZY = re.compile(  # attributes that scripts read, in place of which `src` is a placeholder or missing
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
    """The pieces of an HTML page, whose encoding is found out. Raises BadSample for what the parser refuses."""
    if (tags := page.count(b"<")) > MAX_TAGS:
        raise BadSample(Reason.BAD_ROW, f"the page has {tags} tags; at most {MAX_TAGS} are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)  # XHTML is read as what it looks like
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        try:
            return list(_read(BeautifulSoup(page, "lxml")))
        except ParserRejectedMarkup as error:
            raise BadSample(Reason.BAD_ROW, f"the page is no HTML: {error}") from None


class _Place(NamedTuple):
    """Where an element stands."""

    shown: bool
    article: bool
    block: Tag  # what sets it off from other texts: a paragraph, a heading, an item of a list, a cell


def _read(soup: BeautifulSoup) -> Iterator[Piece]:
    places = {id(soup): _Place(True, False, soup)}
    block, last = 0, places[id(soup)].block
    for node in soup.descendants:
        around = places[id(node.parent)]
        if isinstance(node, Tag):
            element = node.name
            article = around.article or _ARTICLE.fullmatch(element) is not None
            shown = around.shown and not _beside(node, article)
            places[id(node)] = _Place(shown, article, around.block if _INLINE.fullmatch(element) else node)
            block += element == "br"
            if shown and element in _IMAGES and (names := _names(node)):
                yield Piece(image=names[0], others=tuple(names[1:]))
        elif around.shown and type(node) is NavigableString:  # comments and declarations are kinds of it
            block += around.block is not last
            last = around.block
            yield Piece(_SPACE.sub(" ", node), block=block)


def _names(image: Tag) -> list[str]:
    """The addresses of an image, best first: what scripts load later, its source, other sizes."""
    around = [image, *_sources(image)]
    lazy = [(name, value) for tag in around for name, value in _attributes(tag) if _LAZY.fullmatch(name)]
    lazy.sort(key=lambda pair: _SMALL.search(pair[0]) is not None)
    later = [one for name, value in lazy for one in _sized(value) if _is_file(name, one)]
    own = [value for name, value in _attributes(image) if name == "src"]
    sets = [one for tag in around for name, value in _attributes(tag) if name == "srcset" for one in _sized(value)]
    unscripted = [value for tag in around[1:] for name, value in _attributes(tag) if name == "src"]
    return list(dict.fromkeys((*later, *own, *unscripted, *sets)))[:MAX_NAMES]


def _sources(image: Tag) -> list[Tag]:
    """The sources of a `picture` around an image, and what a `noscript` next to it shows instead."""
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
    """The names in a list such as `a.jpg 640w, b.jpg 2x`, the largest first; or the one name."""
    if len(value) > MAX_LIST or not _SIZE.search(value):
        return [value]
    found = [(url, float(size or 1)) for url, size in _LISTED.findall(value)]
    return [url for url, _ in sorted(found, key=lambda pair: -pair[1])]


def _is_file(name: str, value: str) -> bool:
    """True if the value of a script's attribute names an image, as far as can be seen."""
    given = not _SPACE.search(value.strip()) and ("/" in value or "." in value)
    return given and ("src" in name or _FILE.search(value) is not None)


def _beside(tag: Tag, article: bool) -> bool:
    """Whether an element is of the site, or not to be seen, rather than of the document."""
    if _UNSEEN.fullmatch(tag.name) or (_FRAME.fullmatch(tag.name) and not article):
        return True
    words = (tag.get("role"), tag.get("id"), *(tag.get("class") or ()))
    return not _WHOLE.fullmatch(tag.name) and any(_NAVIGATION.fullmatch(str(word)) for word in words)
