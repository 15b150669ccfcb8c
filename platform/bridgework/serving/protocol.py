"""Schemas of the HTTP API: a subset of OpenAI's API, and three routes in the same style.

A request is read completely or rejected. A field that is not supported is accepted if it is empty
or has the value that changes nothing, e.g. `frequency_penalty: 0`; any other value is an error.
"""

import base64
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from bridgework.errors import suggest
from bridgework.serving.errors import APIError, summarize

MAX_LIST = 4_096  # parsed items of a list; `Limits` of options.py sets the limit of a request
MAX_CHOICES = 16  # answers to one prompt
MAX_BIASES = 1_024
Neutral = Mapping[str, tuple[Any, ...]]  # field -> the values that change nothing

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[Text, Field(max_length=512)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _kind(value: Any) -> str:
    """Return the branch of a union of a string and a list, so that errors name only this one."""
    return "string" if isinstance(value, str) else "list"


class Strict(BaseModel):
    """A JSON object without ignored fields. Numbers are strict: "1" and NaN are rejected.

    A field that is not declared is accepted only with a value of `neutral` or `empty`: these change
    nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[Neutral] = {}
    empty: ClassVar[tuple[Any, ...]] = (None, [], {})

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        supported = {name: value for name, value in given.items() if name in cls._names()}
        for name, value in given.items():
            if name not in supported and not cls._is_neutral(name, value):
                raise cls._unsupported(name, value)
        return supported

    @classmethod
    def _names(cls) -> set[str]:
        """Return the fields as JSON names them."""
        return {field.alias or name for name, field in cls.model_fields.items()}

    @classmethod
    def _is_neutral(cls, name: str, value: Any) -> bool:
        all_empty = (
            isinstance(value, dict)
            and bool(value)
            and all(one in cls.empty for one in value.values())
        )
        return value in cls.empty or all_empty or _among(value, cls.neutral.get(name, ()))

    @classmethod
    def _unsupported(cls, name: str, value: Any) -> APIError:
        if name in cls.neutral:
            allowed = " or ".join(summarize(v) for v in cls.neutral[name]) or "nothing"
            given = f"Got {summarize(value)}; expected {allowed}"
            message = f"{name}: not supported. {given}. Fix: leave it out"
            return APIError(400, message, code="unsupported", param=name)
        near = suggest(name, [*cls._names(), *cls.neutral]) if len(name) < 64 else ""
        hint = near if "did you mean" in near else ""
        return APIError(
            400, f"{name[:64]}: unknown field{hint}. Fix: leave it out", code="unknown", param=name
        )


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Compare as JSON: 0 equals 0.0, but not false."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


class Body(Strict):
    """A request. The labels are for the caller; they never reach the model, as in OpenAI's API."""

    model: Name
    # labels
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: dict[str, str] | None = None


# --- chat


class TextPart(Strict):
    neutral = {"prompt_cache_breakpoint": ()}

    type: Literal["text"]
    text: str


class ImageURL(Strict):
    url: str  # data:image/png;base64,...
    detail: Literal["auto", "low", "high"] | None = None  # models that tile images reject low


class ImagePart(Strict):
    neutral = {"prompt_cache_breakpoint": ()}

    type: Literal["image_url"]
    image_url: ImageURL


class VideoURL(Strict):
    url: str  # data:video/jpeg;base64,FRAME,FRAME,...


class VideoPart(Strict):
    neutral = {"prompt_cache_breakpoint": ()}

    type: Literal["video_url"]
    video_url: VideoURL


Piece = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]
Pieces = Annotated[list[Piece], Field(min_length=1, max_length=MAX_LIST)]


class Message(Strict):
    """One message.

    Empty fields of an assistant message are accepted, because clients send answers back.
    """

    neutral = {
        name: ()
        for name in ("name", "refusal", "audio", "annotations", "tool_calls", "function_call")
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("string")] | Annotated[Pieces, Tag("list")], Discriminator(_kind)
    ]

    @model_validator(mode="after")
    def _check_images_are_from_users(self) -> "Message":
        if self.role != "user" and any(not isinstance(piece, TextPart) for piece in self.pieces()):
            raise ValueError(
                f"an image in a message of role {self.role!r}. Fix: move it into a user message"
            )
        return self

    def pieces(self) -> Sequence[TextPart | ImagePart | VideoPart]:
        """Return the content as a list of parts."""
        return (
            [TextPart(type="text", text=self.content)]
            if isinstance(self.content, str)
            else self.content
        )


class SamplingParams(Body):
    """A request for text, with its sampling parameters and limits."""

    neutral = {
        "n": (1,),
        "stream": (False,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": (),
        "logprobs": (False,),
        "top_logprobs": (0,),
        # vLLM's API
        "top_k": (-1, 0),
        "min_p": (0,),
        "repetition_penalty": (1,),
        "length_penalty": (1,),
        "min_tokens": (0,),
        "ignore_eos": (False,),
        "best_of": (1,),
        "use_beam_search": (False,),
        "skip_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
    }

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # default 1.0; 0 is greedy
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[
            Annotated[Text, Tag("string")]
            | Annotated[list[Text], Field(max_length=4), Tag("list")],
            Discriminator(_kind),
        ]
        | None
    ) = None
    seed: Seed | None = None

    @model_validator(mode="after")
    def _check_one_token_limit(self) -> "SamplingParams":
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            given = f"Got {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}"
            raise _conflict("max_tokens", f"two limits. {given}; expected one. Fix: leave one out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tokens(self) -> int | None:
        """The limit on generated tokens, under either of its two names."""
        return self.max_tokens or self.max_completion_tokens


class TextParams(SamplingParams):
    """A request for one or several answers to a prompt, from the engine."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None  # answers; default 1
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # {"TOKEN ID": bias}
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)] | None = None

    @property
    def answers(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    @property
    def top(self) -> int | None:
        """Number of alternatives whose logprobs are asked for; None without logprobs."""
        return None

    @property
    def json_form(self) -> dict[str, Any] | None:
        """JSON schema of the answer; None for any text."""
        return None

    @property
    def usage_chunk(self) -> bool:
        """True if a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _check_usage_of_a_stream(self) -> "TextParams":
        if self.usage_chunk and not self.stream:
            raise _conflict("stream_options", "include_usage needs stream: true")
        return self


class StreamOptions(Strict):
    neutral = {"include_obfuscation": (False,)}

    include_usage: bool | None = None


class StructuredOutputs(Strict):
    """The required form of an answer, in vLLM's notation."""

    neutral = {name: () for name in ("regex", "grammar", "structural_tag")}
    empty = (None,)  # not {}: an empty JSON schema asks for any JSON

    choice: Annotated[list[Text], Field(min_length=1, max_length=256)] | None = None
    # a JSON schema
    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _check_one_form(self) -> "StructuredOutputs":
        given = [self.choice is not None, self.json_ is not None, bool(self.json_object)]
        if sum(given) > 1:
            raise ValueError("several forms of one answer. Fix: leave all but one out")
        return self


class JSONSchema(Strict):
    """Name and schema of a `response_format`; the schema is always kept to (`strict`)."""

    name: Annotated[Text, Field(max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None


class ResponseFormat(Strict):
    """The required form of an answer, in OpenAI's notation."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _conflict("json_schema", "given with type 'json_schema', and only then")
        return self


class ChatRequest(TextParams):
    """Body of POST /v1/chat/completions."""

    neutral = {
        **SamplingParams.neutral,
        "tools": (),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": (),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
        # vLLM's API
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template": (),
        "chat_template_kwargs": (),
        "echo": (False,),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def choices(self) -> list[str] | None:
        """The candidate answers, if the answer is chosen instead of generated."""
        return None if self.structured_outputs is None else self.structured_outputs.choice

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def json_form(self) -> dict[str, Any] | None:
        form, other = self.response_format, self.structured_outputs
        if form is not None and form.json_schema is not None:
            return form.json_schema.schema_
        if other is not None and other.json_ is not None:
            return other.json_
        any_object = (form is not None and form.type == "json_object") or (
            other is not None and bool(other.json_object)
        )
        return {"type": "object"} if any_object else None

    @model_validator(mode="after")
    def _check_combinations(self) -> "ChatRequest":
        last = self.messages[-1].role
        if last != "user":
            at = f"messages.{len(self.messages) - 1}.role"
            reason = f"the last message is not the user's. Got {last!r}; expected 'user'"
            raise _conflict(at, reason)
        if self.top_logprobs and not self.logprobs:
            raise _conflict("top_logprobs", "needs logprobs: true")
        form = self.response_format
        if form is not None and form.type != "text" and self.structured_outputs is not None:
            reason = "the form of the answer is given twice. Fix: leave out structured_outputs"
            raise _conflict("response_format", reason)
        if self.choices is not None:
            self._check_choice_is_not_sampled()
        return self

    def _check_choice_is_not_sampled(self) -> None:
        """Reject sampling parameters, because the best choice is returned."""
        what = "with structured_outputs.choice the answer"
        if self.stream:
            raise _conflict("stream", f"{what} comes in one piece. Fix: leave out stream")
        if self.temperature not in (None, 0, 1):
            fix = "Fix: leave out temperature, or send 0"
            raise _conflict("temperature", f"{what} is not sampled. {fix}")
        if self.top_p not in (None, 1) and self.temperature != 0:
            raise _conflict("top_p", f"{what} is not sampled. Fix: leave out top_p")
        if self.stops:
            raise _conflict("stop", f"{what} is never cut. Fix: leave out stop")
        sampled = ("n", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs")
        for name in sampled:
            if getattr(self, name) and (name, getattr(self, name)) != ("n", 1):
                raise _conflict(name, f"{what} is not sampled. Fix: leave out {name}")


def _conflict(param: str, reason: str) -> APIError:
    return APIError(400, f"{param}: {reason}", code="invalid_value", param=param)


class CompletionRequest(TextParams):
    """Body of POST /v1/completions: texts that the model continues, without a template."""

    neutral = {
        **TextParams.neutral,
        "suffix": ("",),
        "echo": (False,),
        "add_special_tokens": (True,),
        "response_format": ({"type": "text"},),
    }

    prompt: Annotated[
        Annotated[Text, Tag("string")]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_LIST), Tag("list")],
        Discriminator(_kind),
    ]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @model_validator(mode="after")
    def _check_streamed_prompts(self) -> "CompletionRequest":
        if self.stream and len(self.prompts) > 1:
            raise _conflict("prompt", "a stream continues one prompt. Fix: leave out stream")
        return self


class TokenizeRequest(Body):
    """Body of POST /tokenize, as in vLLM: a text, or a conversation in the model's template."""

    neutral = {
        "add_generation_prompt": (True,),
        "add_special_tokens": (True,),
        "return_token_strs": (False,),
    }

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST)] | None = None

    @model_validator(mode="after")
    def _check_one_input(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise _conflict("prompt", "expected either prompt or messages")
        return self


@dataclass(frozen=True)
class Scored:
    """A token of an answer, with its log-probability in nats."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()

    def chat(self) -> dict[str, Any]:
        """Return it in the form of chat completions."""
        top = [_token(token, logprob) for token, logprob in self.top]
        return _token(self.token, self.logprob) | {"top_logprobs": top}


def _token(token: str, logprob: float) -> dict[str, Any]:
    whole = "\ufffd" not in token  # the bytes of a part of a character are not known
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if whole else None}


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer."""

    index: int  # of the answer, if several are asked for
    text: str
    logprobs: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A replica's answer, or the end of a streamed one. Here, because a gateway loads no torch."""

    text: str  # "" at the end of a stream
    prompt_tokens: int  # images included
    completion_tokens: int
    finish_reason: str
    index: int = 0
    logprobs: tuple[Scored, ...] = ()

    @property
    def usage(self) -> "Usage":
        """The tokens in OpenAI's form."""
        return Usage.of(self.prompt_tokens, self.completion_tokens)


class Usage(BaseModel):
    """Numbers of tokens of a request, in OpenAI's form."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int = 0) -> "Usage":
        return cls(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )

    @classmethod
    def total(cls, answers: Sequence[Answer]) -> "Usage":
        """Return the tokens of several answers to one prompt, which is counted once."""
        return cls.of(answers[0].prompt_tokens, sum(a.completion_tokens for a in answers))


class ResponseHeader(BaseModel):
    """The first fields of every answer."""

    id: str  # contains the deployment, so that `bridgework trace` can follow it back to the data
    object: str
    created: int
    model: str

    @classmethod
    def of(cls, prefix: str, kind: str, deployment: str, model: str) -> "ResponseHeader":
        name = f"{prefix}-{deployment}-{secrets.token_hex(6)}"
        return cls(id=name, object=kind, created=int(time.time()), model=model)


def model_card(name: str) -> dict[str, Any]:
    """Return an entry of /v1/models."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "bridgework"}


def completion(head: ResponseHeader, answers: Sequence[Answer], scored: bool) -> dict[str, Any]:
    """Return a complete chat answer. With `scored`, its choices have logprobs."""
    choices = [
        {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "finish_reason": answer.finish_reason,
            "logprobs": _chat_logprobs(answer.logprobs) if scored else None,
        }
        for answer in answers
    ]
    return head.model_dump() | {"choices": choices, "usage": Usage.total(answers).model_dump()}


def chunk(
    head: ResponseHeader,
    delta: dict[str, str],
    finish: str | None = None,
    *,
    index: int = 0,
    logprobs: Sequence[Scored] = (),
) -> dict[str, Any]:
    """Return a chunk of a streamed answer."""
    choice = {
        "index": index,
        "delta": delta,
        "finish_reason": finish,
        "logprobs": _chat_logprobs(logprobs) if logprobs else None,
    }
    return head.model_dump() | {"choices": [choice]}


def text_completion(
    head: ResponseHeader, answers: Sequence[Answer], scored: bool, usage: Usage
) -> dict[str, Any]:
    """Return the complete answer of /v1/completions."""
    choices = [
        _text_choice(answer.index, answer.text, answer.finish_reason, answer.logprobs, scored)
        for answer in answers
    ]
    return head.model_dump() | {"choices": choices, "usage": usage.model_dump()}


def text_chunk(head: ResponseHeader, piece: Delta | Answer) -> dict[str, Any]:
    """Return a chunk of a streamed answer of /v1/completions."""
    finish = piece.finish_reason if isinstance(piece, Answer) else None
    scored = bool(piece.logprobs)
    choice = _text_choice(piece.index, piece.text, finish, piece.logprobs, scored)
    return head.model_dump() | {"choices": [choice]}


def _text_choice(
    index: int, text: str, finish: str | None, logprobs: Sequence[Scored], scored: bool
) -> dict[str, Any]:
    values = {
        "tokens": [one.token for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [dict(one.top) for one in logprobs],
        "text_offset": list(accumulate((len(o.token) for o in logprobs), initial=0))[:-1],
    }
    return {
        "index": index,
        "text": text,
        "finish_reason": finish,
        "logprobs": values if scored else None,
    }


def _chat_logprobs(logprobs: Sequence[Scored]) -> dict[str, Any]:
    return {"content": [one.chat() for one in logprobs], "refusal": None}


def last_chunk(head: ResponseHeader, usage: Usage) -> dict[str, Any]:
    """Return the last chunk of a stream with `stream_options.include_usage`."""
    return head.model_dump() | {"choices": [], "usage": usage.model_dump()}


# --- embeddings, classes, ranks, captions


class ImageInput(Strict):
    image: str  # a data: URL


class TextInput(Strict):
    text: Text


def _input_kind(value: Any) -> str:
    if isinstance(value, dict):
        return "text" if "text" in value else "image"
    return "tokens" if isinstance(value, int | list) else "string"


def _reject_tokens(value: Any) -> Any:
    raise ValueError("token ids of another tokenizer. Fix: send the text itself")


Input = Annotated[
    Annotated[Text, Tag("string")]
    | Annotated[ImageInput, Tag("image")]
    | Annotated[TextInput, Tag("text")]
    | Annotated[Any, AfterValidator(_reject_tokens), Tag("tokens")],
    Discriminator(_input_kind),
]


class EmbeddingRequest(Body):
    """Body of POST /v1/embeddings.

    A string that begins with `data:image/` is an image, {"text": ...} never.
    """

    input: Annotated[
        Annotated[Text, Tag("string")]
        | Annotated[list[Input], Field(min_length=1, max_length=MAX_LIST), Tag("list")],
        Discriminator(_kind),
    ]
    encoding_format: Literal["float", "base64"] | None = None  # default: float
    # of the vectors, at most the model's: the first ones, scaled to length 1 again
    dimensions: Annotated[int, Field(ge=1)] | None = None

    def inputs(self) -> list[ImageInput | TextInput]:
        """Return the inputs as a list."""
        given: list[Any] = [self.input] if isinstance(self.input, str) else self.input
        return [_input(one) if isinstance(one, str) else one for one in given]


def _input(text: str) -> ImageInput | TextInput:
    return ImageInput(image=text) if text.startswith("data:image/") else TextInput(text=text)


def shortened(values: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """Return the first `dimensions` numbers of an embedding (D,), scaled to length 1 again."""
    if dimensions is None or dimensions == len(values):
        return values
    cut = values[:dimensions]
    return cast(NDArray[np.float32], cut / max(float(np.linalg.norm(cut)), 1e-12))


def vector(
    values: NDArray[np.float32], form: Literal["float", "base64"] | None
) -> str | list[float]:
    """Return an embedding (D,) as numbers, or as base64 of little-endian float32.

    base64 is the default of the openai client.
    """
    if form == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return cast(list[float], values.tolist())


class ClassifyRequest(Body):
    """Body of POST /v1/classify: zero-shot classes by the cosine of image and label."""

    image: str
    labels: Annotated[list[Text], Field(min_length=1, max_length=MAX_LIST)]
    template: str = "a photo of a {}"  # CLIP's; {} is replaced by the label
    # factor of the cosines before the softmax; the default is CLIP's upper bound
    scale: Annotated[float, Field(gt=0, le=1000)] = 100.0

    @model_validator(mode="after")
    def _check_template(self) -> "ClassifyRequest":
        if self.template.count("{}") != 1:
            raise _conflict("template", "expected {} once, for the label")
        return self


class RankRequest(Body):
    """Body of POST /v1/rank: candidates, ranked by the `scoring` of the model's stage."""

    image: str
    candidates: Annotated[list[Text], Field(min_length=1, max_length=MAX_LIST)]
    question: Text | None = None  # default: the question of the model's training


class CaptionRequest(SamplingParams):
    """Body of POST /v1/captions: one caption for each image."""

    image: Annotated[
        Annotated[str, Tag("string")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_LIST), Tag("list")],
        Discriminator(_kind),
    ]
    prompt: Text | None = None  # default: the prompt of the model's training
    beams: Annotated[int, Field(ge=1, le=10)] = 1  # above 1: beam search instead of sampling

    @model_validator(mode="after")
    def _check_beams_or_sampling(self) -> "CaptionRequest":
        if self.beams > 1 and self.temperature:
            raise _conflict("temperature", self._beams_reason("temperature", self.temperature))
        if self.beams > 1 and self.top_p not in (None, 1):
            raise _conflict("top_p", self._beams_reason("top_p", self.top_p))
        return self

    def _beams_reason(self, name: str, value: float | None) -> str:
        return (
            f"beams search and {name} samples. Got beams {self.beams} and {name} {value}. "
            "Fix: leave one out"
        )

    @property
    def images(self) -> list[str]:
        """The data: URLs."""
        return [self.image] if isinstance(self.image, str) else self.image
