"""From messages to what the Pipeline reads: parts in the order of speaking, and the images they show."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from bridgework.data.samples import Part
from bridgework.serving import images as images_of
from bridgework.serving.images import Limits
from bridgework.serving.options import Options
from bridgework.serving.protocol import Drawn, ImagePart, Message
from bridgework.serving.refusals import Refusal

if TYPE_CHECKING:
    from bridgework.generation import Sampling  # brings torch, which a gateway does without


def read(messages: Sequence[Message], limits: Limits) -> tuple[list[Part], list[bytes]]:
    """Parts and checked images. Counts come first, so that nothing large is looked at in vain. Raises Refusal."""
    check_count("messages", len(messages), limits.messages)
    pieces = [piece for message in messages for piece in message.pieces()]
    check_count("images", sum(isinstance(p, ImagePart) for p in pieces), limits.images, param="messages")
    check_text((p.text for p in pieces if not isinstance(p, ImagePart)), limits, "messages")
    parts: list[Part] = []
    images: list[bytes] = []
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        for j, piece in enumerate(message.pieces()):
            if j:  # between an image and its question, as the training data writes it
                parts.append(Part(role, text="\n"))
            if isinstance(piece, ImagePart):
                parts.append(Part(role, image=len(images)))
                images.append(images_of.read(piece.image_url.url, limits, f"messages.{i}.content.{j}.image_url.url"))
            else:
                parts.append(Part(role, text=piece.text))
    return parts, images


def draw(body: Drawn, options: Options) -> "Sampling":
    """The Pipeline's keywords for how to sample. Raises Refusal for more tokens than the server gives."""
    given = body.max_completion_tokens or body.max_tokens
    if given is not None and given > options.max_new_tokens:
        message = f"max_tokens {given} is above the {options.max_new_tokens} that this server gives"
        raise Refusal(400, message, code="too_many_tokens", param="max_tokens")
    return {
        "max_new_tokens": given or options.max_new_tokens,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "stop": body.stops,
        "seed": body.seed,
    }


def check_count(what: str, given: int, allowed: int, *, param: str | None = None) -> None:
    """Raises Refusal for more things of a kind than one request may hold."""
    if given > allowed:
        message = f"{given} {what} in one request; at most {allowed} allowed"
        raise Refusal(400, message, code="too_many", param=param or what)


def check_text(texts: Iterable[str], limits: Limits, param: str) -> None:
    """Raises Refusal for more characters than one request may hold."""
    given = sum(map(len, texts))
    if given > limits.text_chars:
        message = f"{param}: {given} characters in one request; at most {limits.text_chars} allowed"
        raise Refusal(400, message, code="text_too_long", param=param)
