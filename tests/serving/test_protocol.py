"""Schemas: real client requests are accepted, unsupported ones are rejected with a one-line error."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from openai.types.chat import ChatCompletion, ChatCompletionMessage

from bridgework.serving.bodies import MAX_VALUES, JSONRoute
from bridgework.serving.gateway import answer_errors
from bridgework.serving.protocol import (
    Answer,
    CaptionRequest,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    RankRequest,
    ResponseHeader,
    TokenizeRequest,
    completion,
)

USER = {"role": "user", "content": "x"}
INSIDES = (
    "function-",
    "union",
    "Input should",
    "pydantic",
    "Tag",
    "validator",
    "[str",
    "list[",
    "dict[",
    "Model",
)


def api() -> FastAPI:
    app, router = FastAPI(), APIRouter(route_class=JSONRoute)

    @router.post("/chat")
    async def chat(body: ChatRequest) -> dict[str, Any]:
        return body.model_dump(exclude_unset=True)

    @router.post("/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        return body.model_dump(exclude_unset=True)

    @router.post("/classify")
    async def classify(body: ClassifyRequest) -> dict[str, Any]:
        return body.model_dump(exclude_unset=True)

    @router.post("/rank")
    async def rank(body: RankRequest) -> dict[str, Any]:
        return body.model_dump(exclude_unset=True)

    @router.post("/captions")
    async def captions(body: CaptionRequest) -> dict[str, Any]:
        return body.model_dump(exclude_unset=True)

    @router.post("/completions")
    async def completions(body: CompletionRequest) -> dict[str, Any]:
        return body.model_dump(exclude_unset=True)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        return body.model_dump(exclude_unset=True)

    app.include_router(router)
    answer_errors(app)
    return app


def post(path: str, body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(api()), base_url="http://test"
        ) as http:
            how = {"content": body} if isinstance(body, bytes) else {"json": body}
            return await http.post(path, headers={"content-type": "application/json"}, **how)

    return asyncio.run(send())


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER]} | fields


def error(path: str, body: Any) -> dict[str, Any]:
    reply = post(path, body)
    assert reply.status_code == 400, reply.text
    found: dict[str, Any] = reply.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert "\n" not in found["message"] and len(reply.text) < 1000
    assert not any(word in reply.text for word in INSIDES), reply.text
    return found


NEUTRAL: list[dict[str, Any]] = [
    {"n": 1},
    {"frequency_penalty": 0},
    {"presence_penalty": 0.0},
    {"logit_bias": {}},
    {"logprobs": False, "top_logprobs": 0},
    {"tools": []},
    {"tool_choice": "none"},
    {"tool_choice": "auto", "parallel_tool_calls": True},
    {"functions": [], "function_call": "none"},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"]},
    {"service_tier": "auto"},
    {"store": False, "metadata": {}},
    {"reasoning_effort": "none"},
    {"verbosity": "medium"},
    {"stop": []},
    {"stream": False, "stream_options": {}},
    {"stream_options": {"include_usage": False}},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"structured_outputs": {"json": None, "regex": None}},
    {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False},
    {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}},
    {"max_tokens": 5, "max_completion_tokens": 5},
    dict.fromkeys(
        (
            *(
                "audio",
                "frequency_penalty",
                "function_call",
                "functions",
                "logit_bias",
                "logprobs",
                "max_tokens",
            ),
            *(
                "max_completion_tokens",
                "metadata",
                "modalities",
                "n",
                "parallel_tool_calls",
                "prediction",
                "seed",
            ),
            *(
                "presence_penalty",
                "prompt_cache_key",
                "reasoning_effort",
                "response_format",
                "safety_identifier",
            ),
            *(
                "service_tier",
                "stop",
                "store",
                "stream",
                "stream_options",
                "temperature",
                "tool_choice",
                "tools",
            ),
            *(
                "top_logprobs",
                "top_p",
                "user",
                "verbosity",
                "web_search_options",
                "structured_outputs",
            ),
        )
    ),
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda fields: ",".join(fields)[:60])
def test_neutral_fields_are_accepted(fields: dict[str, Any]) -> None:
    reply = post("/chat", chat(**fields))
    assert reply.status_code == 200, reply.text


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
USED: list[dict[str, Any]] = [
    {"n": 3},
    {"frequency_penalty": 0.5, "presence_penalty": -1.0},
    {"logit_bias": {"50256": -100}},
    {"logprobs": True, "top_logprobs": 3},
    {"response_format": {"type": "json_object"}},
    {"response_format": SCHEMA},
    {"structured_outputs": {"json": {"type": "object"}}},
    {"structured_outputs": {"json_object": True}},
    {"max_tokens": 10**6},
]


@pytest.mark.parametrize("fields", USED, ids=lambda fields: ",".join(fields))
def test_options_of_generation_are_read(fields: dict[str, Any]) -> None:
    reply = post("/chat", chat(**fields))
    assert reply.status_code == 200, reply.text
    assert fields.keys() <= reply.json().keys()


def test_json_form_is_the_schema_that_was_sent() -> None:
    def form(**fields: Any) -> Any:
        return ChatRequest.model_validate(chat(**fields)).json_form

    assert form() is form(response_format={"type": "text"}) is None
    assert form(response_format=SCHEMA) == {"type": "object"}
    assert form(response_format={"type": "json_object"}) == {"type": "object"}
    assert form(structured_outputs={"json": {}}) == {}  # any JSON


CHANGING: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("service_tier", {"service_tier": "flex"}),
    ("store", {"store": True}),
    ("reasoning_effort", {"reasoning_effort": "high"}),
    ("verbosity", {"verbosity": "low"}),
    ("prediction", {"prediction": {"type": "content", "content": "x"}}),
    ("web_search_options", {"web_search_options": {"search_context_size": "low"}}),
    ("top_k", {"top_k": 5}),
    ("repetition_penalty", {"repetition_penalty": 1.2}),
    (
        "stream_options.include_obfuscation",
        {"stream": True, "stream_options": {"include_obfuscation": True}},
    ),
    ("messages.0.name", {"messages": [USER | {"name": "Bob"}]}),
    (
        "messages.1.refusal",
        {"messages": [USER, {"role": "assistant", "content": "", "refusal": "no"}, USER]},
    ),
    (
        "messages.1.tool_calls",
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}, USER]},
    ),
]


@pytest.mark.parametrize(
    ("param", "fields"), CHANGING, ids=lambda value: value if isinstance(value, str) else ""
)
def test_unsupported_fields_are_rejected_by_name(param: str, fields: dict[str, Any]) -> None:
    found = error("/chat", chat(**fields))
    assert (found["param"], found["code"]) == (param, "unsupported")
    assert found["message"].startswith(f"{param}: not supported. Got ")
    assert found["message"].endswith("Fix: leave it out")


def test_answer_is_accepted_as_a_message() -> None:
    head = ResponseHeader.of("chatcmpl", "chat.completion", "0" * 12, "m")
    answer = ChatCompletion.model_validate(completion(head, [Answer("red", 3, 2, "stop")], False))
    for message in (
        answer.choices[0].message.model_dump(),
        answer.choices[0].message.model_dump(exclude_none=True),
        ChatCompletionMessage(role="assistant", content="red").model_dump()
        | {"tool_calls": [], "annotations": []},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "assistant", "content": "red", "provider_specific_fields": {"refusal": None}},
    ):
        reply = post("/chat", chat(messages=[USER, message, USER]))
        assert reply.status_code == 200, reply.text


def text(value: Any) -> dict[str, Any]:
    return {"type": "text", "text": value}


def shown(**fields: Any) -> dict[str, Any]:
    return {"type": "image_url"} | fields


def content(*parts: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": list(parts)}])


WRONG: list[tuple[str, Any, str | None, str]] = [
    ("/chat", [1, 2], None, "expected an object"),
    ("/chat", {"messages": [USER]}, "model", "missing"),
    ("/chat", chat(model=3), "model", "expected a string"),
    ("/chat", chat(model=""), "model", "expected at least 1 characters"),
    ("/chat", chat(model="x" * 10_000), "model", "expected at most 512 characters"),
    ("/chat", chat(messages=None), "messages", "expected a list"),
    ("/chat", chat(messages=[]), "messages", "expected at least 1"),
    ("/chat", chat(messages=["x"]), "messages.0", "expected an object"),
    (
        "/chat",
        chat(messages=[{"role": "tool", "content": "x"}]),
        "messages.0.role",
        "Got \"tool\"; expected 'system'",
    ),
    ("/chat", chat(messages=[{"role": "user"}]), "messages.0.content", "missing"),
    (
        "/chat",
        chat(messages=[USER | {"content": None}]),
        "messages.0.content",
        "expected a string or a list",
    ),
    (
        "/chat",
        chat(messages=[USER | {"content": 3}]),
        "messages.0.content",
        "expected a string or a list",
    ),
    ("/chat", content(), "messages.0.content", "expected at least 1"),
    ("/chat", content("x"), "messages.0.content.0", "expected an object"),
    ("/chat", content({"text": "x"}), "messages.0.content.0", "the field 'type' is missing"),
    (
        "/chat",
        content({"type": "file", "file": {}}),
        "messages.0.content.0",
        "Got 'file'; expected 'text', 'image_url', 'video_url'",
    ),
    ("/chat", content(text(None)), "messages.0.content.0.text", "expected a string"),
    ("/chat", content(shown()), "messages.0.content.0.image_url", "missing"),
    (
        "/chat",
        content(shown(image_url="data:")),
        "messages.0.content.0.image_url",
        "expected an object",
    ),
    ("/chat", content(shown(image_url={})), "messages.0.content.0.image_url.url", "missing"),
    (
        "/chat",
        content(shown(image_url={"url": "x", "detail": "original"})),
        "messages.0.content.0.image_url.detail",
        "expected 'auto', 'low' or 'high'",
    ),
    ("/chat", chat(temperature="1"), "temperature", 'Got "1"; expected a number'),
    ("/chat", chat(temperature=3), "temperature", "Got 3; expected at most 2"),
    ("/chat", chat(temperature=-1), "temperature", "expected at least 0"),
    ("/chat", chat(top_p=0), "top_p", "expected more than 0"),
    ("/chat", chat(max_tokens=0), "max_tokens", "expected at least 1"),
    ("/chat", chat(max_tokens=1.5), "max_tokens", "expected an integer"),
    ("/chat", chat(max_tokens=2, max_completion_tokens=3), "max_tokens", "two limits"),
    ("/chat", chat(seed=2**64), "seed", "expected"),
    ("/chat", chat(stop=""), "stop", "expected at least 1 characters"),
    ("/chat", chat(stop=3), "stop", "expected a string or a list"),
    ("/chat", chat(stop=list("abcde")), "stop", "expected at most 4"),
    ("/chat", chat(stop=["a", None]), "stop.1", "expected a string"),
    ("/chat", chat(stream="yes"), "stream", "expected true or false"),
    ("/chat", chat(stream_options={"include_usage": True}), "stream_options", "needs stream: true"),
    ("/chat", chat(n=0), "n", "expected at least 1"),
    ("/chat", chat(n=17), "n", "expected at most 16"),
    ("/chat", chat(n=True), "n", "expected an integer"),
    ("/chat", chat(presence_penalty=3), "presence_penalty", "expected at most 2"),
    ("/chat", chat(logit_bias={"x": 1}), "logit_bias.x", "invalid value"),
    ("/chat", chat(logit_bias={"3": 101}), "logit_bias.3", "expected at most 100"),
    ("/chat", chat(logprobs=1), "logprobs", "expected true or false"),
    ("/chat", chat(top_logprobs=3), "top_logprobs", "needs logprobs: true"),
    ("/chat", chat(logprobs=True, top_logprobs=21), "top_logprobs", "expected at most 20"),
    (
        "/chat",
        chat(response_format={"type": "json_schema"}),
        "response_format.json_schema",
        "given with type 'json_schema'",
    ),
    (
        "/chat",
        chat(response_format={"type": "xml"}),
        "response_format.type",
        "expected 'text', 'json_object' or 'json_schema'",
    ),
    ("/chat", chat(structured_outputs={"choice": ["a"]}, n=2), "n", "not sampled"),
    ("/chat", chat(structured_outputs={"choice": ["a"]}, logprobs=True), "logprobs", "not sampled"),
    (
        "/chat",
        chat(structured_outputs={"choice": ["a"], "json": {}}),
        "structured_outputs",
        "several forms",
    ),
    ("/completions", {"model": "m", "prompt": []}, "prompt", "expected at least 1"),
    ("/completions", {"model": "m", "prompt": "x", "echo": True}, "echo", "not supported"),
    (
        "/completions",
        {"model": "m", "prompt": ["a", "b"], "stream": True},
        "prompt",
        "a stream continues one prompt",
    ),
    ("/tokenize", {"model": "m"}, "prompt", "either prompt or messages"),
    ("/chat", chat(temprature=1), "temprature", "unknown field; did you mean 'temperature'?"),
    ("/chat", chat(**{"x" * 100_000: 1}), "x" * 200, "unknown field"),
    (
        "/chat",
        chat(messages=[USER, {"role": "assistant", "content": "x"}]),
        "messages.1.role",
        "expected 'user'",
    ),
    (
        "/chat",
        chat(structured_outputs={"choice": []}),
        "structured_outputs.choice",
        "expected at least 1",
    ),
    (
        "/chat",
        chat(structured_outputs={"choice": ["a"]}, stream=True),
        "stream",
        "leave out stream",
    ),
    (
        "/chat",
        chat(structured_outputs={"choice": ["a"]}, temperature=0.5),
        "temperature",
        "not sampled",
    ),
    ("/chat", chat(structured_outputs={"choice": ["a"]}, top_p=0.5), "top_p", "not sampled"),
    ("/chat", chat(structured_outputs={"choice": ["a"]}, stop="x"), "stop", "never cut"),
    (
        "/embeddings",
        {"model": "m", "input": [[1, 2], [3]]},
        "input.0",
        "token ids of another tokenizer",
    ),
    ("/embeddings", {"model": "m", "input": [1, 2]}, "input.0", "token ids of another tokenizer"),
    ("/embeddings", {"model": "m", "input": []}, "input", "expected at least 1"),
    ("/embeddings", {"model": "m", "input": None}, "input", "expected a string or a list"),
    (
        "/embeddings",
        {"model": "m", "input": ["a", ""]},
        "input.1",
        "expected at least 1 characters",
    ),
    ("/embeddings", {"model": "m", "input": [{"image": 3}]}, "input.0.image", "expected a string"),
    (
        "/embeddings",
        {"model": "m", "input": "x", "encoding_format": "int8"},
        "encoding_format",
        "'float' or 'base64'",
    ),
    (
        "/classify",
        {"model": "m", "image": "x", "labels": ["a"], "template": "a photo"},
        "template",
        "{} once",
    ),
    ("/classify", {"model": "m", "image": "x", "labels": []}, "labels", "expected at least 1"),
    ("/rank", {"model": "m", "image": "x", "candidates": [3]}, "candidates.0", "expected a string"),
    ("/captions", {"model": "m", "image": []}, "image", "expected at least 1"),
    ("/captions", {"model": "m", "image": 3}, "image", "expected a string or a list"),
    ("/captions", {"model": "m", "image": "x", "beams": 11}, "beams", "expected at most 10"),
    (
        "/captions",
        {"model": "m", "image": "x", "beams": 2, "temperature": 0.5},
        "temperature",
        "leave one out",
    ),
    ("/captions", {"model": "m", "image": "x", "beams": 2, "top_p": 0.5}, "top_p", "leave one out"),
    (
        "/captions",
        {"model": "m", "image": "x", "frequency_penalty": 1},
        "frequency_penalty",
        "not supported",
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))]
)
def test_wrong_value_is_a_one_line_error_without_pydantic_terms(
    path: str, body: Any, param: str | None, message: str
) -> None:
    found = error(path, body)
    assert found["param"] == param, found
    assert message in found["message"], found


def test_lone_surrogates_are_rejected_everywhere() -> None:
    half = "\\ud800"
    for body in (
        '{"model": "%s", "messages": [{"role": "user", "content": "x"}]}',
        '{"model": "m", "messages": [{"role": "user", "content": "%s"}]}',
        '{"model": "m", "messages": [{"role": "%s", "content": "x"}]}',
        '{"model": "m", "%s": 1, "messages": [{"role": "user", "content": "x"}]}',
        '{"model": "m", "stop": "%s", "messages": [{"role": "user", "content": "x"}]}',
    ):
        error("/chat", (body % half).encode())


def test_repeated_field_is_rejected() -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "a", "content": "b"}]}'
    found = error("/chat", body)
    assert (found["param"], found["message"]) == (
        "content",
        "content: given twice. Fix: leave one out",
    )


def test_body_is_limited_before_parsing() -> None:
    many = json.dumps(chat(messages=[USER] * (MAX_VALUES // 2))).encode()
    assert error("/chat", many)["code"] == "too_many"
    assert error("/chat", b"[" * 50_000)["message"] == "the body: nested too deep"
    assert error("/chat", b'{"max_tokens": ' + b"9" * 10_000 + b"}")["code"] == "invalid_request"
    assert error("/chat", b"\xff\xfe\xfa")["code"] in ("invalid_json", "invalid_request")


def test_wrong_content_type_is_415() -> None:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(api()), base_url="http://test"
        ) as http:
            return await http.post(
                "/chat", content=json.dumps(chat()), headers={"content-type": "text/plain"}
            )

    reply = asyncio.run(send())
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_schemas_are_documented() -> None:
    schemas = api().openapi()["components"]["schemas"]
    assert {
        m.__name__ for m in (ChatRequest, EmbeddingRequest, RankRequest, CaptionRequest)
    } <= schemas.keys()
