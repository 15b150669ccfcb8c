"""What goes over the wire: the subset of OpenAI's API that is served, and three routes of our own in its manner.

Unknown fields are refused: a parameter that would be ignored in silence is worse than an error.
"""

import base64
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _whole(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text holds half a character (a lone surrogate)")
    return text


Free = Annotated[str, AfterValidator(_whole)]
Text = Annotated[Free, Field(min_length=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Body(BaseModel):
    """A request. Strict: "1" is no number, and NaN is none either."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: Text
    user: str | None = None  # OpenAI's clients may send it; nothing is done with it


# --- chat ------------------------------------------------------------------------------------------------------------


class _Piece(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Piece):
    type: Literal["text"]
    text: Free


class ImageURL(_Piece):
    url: str  # data:image/png;base64,...
    detail: Literal["auto", "low", "high"] = "auto"  # accepted; every image has the model's own resolution


class ImagePart(_Piece):
    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Piece):
    role: Literal["system", "developer", "user", "assistant"]
    content: Free | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: Free | None = None  # accepted, as `user` is

    @model_validator(mode="after")
    def _images_are_shown_by_users(self) -> "Message":
        if self.role != "user" and any(isinstance(p, ImagePart) for p in self.pieces()):
            raise ValueError(f"a message of role {self.role!r} cannot hold an image; put it into a user message")
        if not self.pieces():
            raise ValueError("the content is empty")
        return self

    def pieces(self) -> Sequence[TextPart | ImagePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class Drawn(Body):
    """How an answer is drawn."""

    n: Literal[1] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0  # OpenAI's default; 0 is greedy
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    seed: Seed | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class StreamOptions(_Piece):
    include_usage: bool = False


class Structure(_Piece):
    """What an answer must be, as vLLM's clients ask for it."""

    choice: Annotated[list[Text], Field(min_length=1, max_length=256)]


class ChatRequest(Drawn):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: Structure | None = None

    @model_validator(mode="after")
    def _the_user_speaks_last(self) -> "ChatRequest":
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.structured_outputs is not None and self.stream:
            raise ValueError("an answer that is chosen comes whole; leave out stream")
        return self


@dataclass(frozen=True)
class Answer:
    """What a replica says: a whole text, or at the end of a stream what it took. Light: a gateway loads no torch."""

    text: str
    prompt_tokens: int  # images included
    completion_tokens: int
    finish_reason: str

    @property
    def usage(self) -> "Usage":
        return Usage.of(self.prompt_tokens, self.completion_tokens)


class Usage(BaseModel):
    """What a request took, as OpenAI reports it."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int = 0) -> "Usage":
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class Head(BaseModel):
    """What every answer begins with. `id` holds the deployment: `bridgework trace` follows it back to the data."""

    id: str
    object: str
    created: int
    model: str

    @classmethod
    def of(cls, prefix: str, kind: str, deployment: str, model: str) -> "Head":
        name = f"{prefix}-{deployment}-{secrets.token_hex(6)}"
        return cls(id=name, object=kind, created=int(time.time()), model=model)


def completion(head: Head, answer: Answer) -> dict[str, Any]:
    """A whole answer."""
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    return head.model_dump() | {"choices": [choice], "usage": answer.usage.model_dump()}


def chunk(head: Head, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    """A piece of a streamed answer."""
    return head.model_dump() | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}


def last_chunk(head: Head, usage: Usage) -> dict[str, Any]:
    """The piece that `stream_options.include_usage` asks for."""
    return head.model_dump() | {"choices": [], "usage": usage.model_dump()}


# --- embeddings, classes, ranks, captions ----------------------------------------------------------------------------


class ImageInput(_Piece):
    image: str  # a data: URL


class TextInput(_Piece):
    text: Text


class EmbeddingRequest(Body):
    """POST /v1/embeddings. A string that begins with `data:image/` is an image; {"text": ...} takes it literally."""

    input: Text | Annotated[list[Text | ImageInput | TextInput], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"

    def inputs(self) -> list[ImageInput | TextInput]:
        given = [self.input] if isinstance(self.input, str) else self.input
        return [_input(one) if isinstance(one, str) else one for one in given]


def _input(text: str) -> ImageInput | TextInput:
    return ImageInput(image=text) if text.startswith("data:image/") else TextInput(text=text)


def vector(values: NDArray[np.float32], form: Literal["float", "base64"]) -> str | list[float]:
    """One embedding: numbers, or base64 of little-endian float32, which the openai client asks for by itself."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode() if form == "base64" else values.tolist()


class ClassifyRequest(Body):
    """POST /v1/classify: which label fits the image, by the cosine of their embeddings."""

    image: str
    labels: Annotated[list[Text], Field(min_length=1)]
    template: Free = "a photo of a {}"  # CLIP's; {} stands for the label
    scale: Annotated[float, Field(gt=0, le=1000)] = 100.0  # of the cosines before the softmax (CLIP's upper bound)

    @model_validator(mode="after")
    def _template_has_a_place(self) -> "ClassifyRequest":
        if self.template.count("{}") != 1:
            raise ValueError("template must hold {} once, where the label goes")
        return self


class RankRequest(Body):
    """POST /v1/rank: candidates by their log-likelihood, as the `scoring` of the model's stage says."""

    image: str
    candidates: Annotated[list[Text], Field(min_length=1)]
    question: Text | None = None  # left out: what the model's training asked


class CaptionRequest(Drawn):
    """POST /v1/captions: one caption for each image."""

    image: str | Annotated[list[str], Field(min_length=1)]
    prompt: Text | None = None  # left out: what the model's training asked
    beams: Annotated[int, Field(ge=1, le=10)] = 1  # above 1: search this wide instead of drawing

    @model_validator(mode="after")
    def _search_or_draw(self) -> "CaptionRequest":
        if self.beams > 1 and "temperature" in self.model_fields_set and self.temperature:
            raise ValueError(
                f"beams search and temperature draws: leave one out (got {self.beams}, {self.temperature})"
            )
        return self

    @property
    def images(self) -> list[str]:
        return [self.image] if isinstance(self.image, str) else self.image
