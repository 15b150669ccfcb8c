"""From messages to the Pipeline's input: parts in reading order, and the images that they show."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from bridgework.data.samples import Part
from bridgework.serving import images as images_of
from bridgework.serving.images import Limits
from bridgework.serving.options import Options
from bridgework.serving.protocol import ChatRequest, ImagePart, Sampled
from bridgework.serving.refusals import Refusal

if TYPE_CHECKING:
    from bridgework.generation import Sampling  # brings torch, which a gateway does without

GREEDY_BELOW = 1e-4  # a temperature that leaves the likeliest token alone, and would overflow float32


def read(body: ChatRequest, limits: Limits, *, tiled: bool) -> tuple[list[Part], list[bytes]]:
    """Parts and checked images; counts are checked first, images last. `tiled`: the model cuts images into tiles.

    Raises Refusal.
    """
    check_count("messages", len(body.messages), limits.messages)
    pieces = [piece for message in body.messages for piece in message.pieces()]
    check_count("images", sum(isinstance(p, ImagePart) for p in pieces), limits.images, param="messages")
    texts = [piece.text for piece in pieces if not isinstance(piece, ImagePart)]
    check_text([*texts, *(body.choices or ())], limits, "messages")
    parts: list[Part] = []
    urls: list[tuple[str, str]] = []
    for i, message in enumerate(body.messages):
        role = "system" if message.role == "developer" else message.role
        for j, piece in enumerate(message.pieces()):
            if j:  # between an image and its question, as the training data writes it
                parts.append(Part(role, text="\n"))
            if isinstance(piece, ImagePart):
                where = f"messages.{i}.content.{j}.image_url"
                if tiled and piece.image_url.detail == "low":
                    raise _coarse(f"{where}.detail")
                parts.append(Part(role, image=len(urls)))
                urls.append((f"{where}.url", piece.image_url.url))
            else:
                parts.append(Part(role, text=piece.text))
    return parts, images_of.read_all(urls, limits)


def draw(body: Sampled, options: Options) -> "Sampling":
    """The Pipeline's keywords for how to sample.

    Raises Refusal for more tokens or longer stop strings than the server allows.
    """
    if body.tokens is not None and body.tokens > options.max_new_tokens:
        message = f"max_tokens {body.tokens} is above the {options.max_new_tokens} that this server gives"
        raise Refusal(400, message, code="too_many_tokens", param="max_tokens")
    stop_chars = sum(map(len, body.stops))
    if stop_chars > options.limits.stop_chars:
        message = f"stop: too long. Got {stop_chars} characters; expected at most {options.limits.stop_chars} together"
        raise Refusal(400, message, code="text_too_long", param="stop")
    temperature = 1.0 if body.temperature is None else body.temperature
    return {
        "max_new_tokens": body.tokens or options.max_new_tokens,
        "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
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


def _coarse(param: str) -> Refusal:
    message = f"{param}: this model reads images in tiles only. Got 'low'; expected 'auto' or 'high'"
    return Refusal(400, message, code="unsupported", param=param)
