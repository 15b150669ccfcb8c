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
            if shown and element == "img" and node.get("src"):
                yield Piece(image=str(node["src"]))
        elif around.shown and type(node) is NavigableString:  # comments and declarations are kinds of it
            block += around.block is not last
            last = around.block
            yield Piece(_SPACE.sub(" ", node), block=block)


def _beside(tag: Tag, article: bool) -> bool:
    """Whether an element is of the site, or not to be seen, rather than of the document."""
    if _UNSEEN.fullmatch(tag.name) or (_FRAME.fullmatch(tag.name) and not article):
        return True
    words = (tag.get("role"), tag.get("id"), *(tag.get("class") or ()))
    return not _WHOLE.fullmatch(tag.name) and any(_NAVIGATION.fullmatch(str(word)) for word in words)
