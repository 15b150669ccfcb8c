"""A document as pieces, in reading order: stretches of text and places of images; and the JSON they come in."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bridgework.data.quarantine import BadSample, Reason


@dataclass(frozen=True)
class Piece:
    """A stretch of text, or the place of an image, by its name. Neighbors of one `block` are on one line."""

    text: str = ""
    image: str | None = None
    block: int = 0
    others: tuple[str, ...] = ()  # names that the image may also have, best first


def mmc4(fields: dict[str, Any]) -> Iterator[Piece]:
    """MMC4's form: sentences, and before each the images matched to it, which the file lists in another order.

    Raises BadSample for what has not this form.
    """
    texts, shown = fields.get("text_list"), fields.get("image_info")
    if not isinstance(texts, list) or not isinstance(shown, list):
        raise BadSample(Reason.BAD_ROW, "`text_list` or `image_info` is no list")
    before = defaultdict[int, list[Any]](list)
    for image in shown:
        at = image.get("matched_text_index") if isinstance(image, dict) else None
        if not isinstance(at, int) or not 0 <= at < len(texts):
            raise BadSample(Reason.BAD_ROW, f"an image is matched to text {at!r}, and there are {len(texts)}")
        before[at].append(image.get("image_name"))
    for at, text in enumerate(texts):
        yield from (Piece(image=_known(name)) for name in before[at])
        yield Piece(_known(text) + " ")


def obelics(fields: dict[str, Any]) -> Iterator[Piece]:
    """OBELICS' form: texts and images side by side, in each place one of the two. Raises BadSample for another."""
    texts, shown = fields.get("texts"), fields.get("images")
    if not isinstance(texts, list) or not isinstance(shown, list) or len(texts) != len(shown):
        raise BadSample(Reason.BAD_ROW, "the row has no `text_list`, and no lists `texts` and `images` of one length")
    for place, (text, name) in enumerate(zip(texts, shown, strict=True)):
        if name is not None:
            yield Piece(image=_known(name))
        if text is not None:
            yield Piece(_known(text), block=place)


def _known(value: Any) -> str:
    if not isinstance(value, str):
        raise BadSample(Reason.BAD_ROW, f"a text or the name of an image is {str(value)[:80]}")
    return value
