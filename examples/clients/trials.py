"""Trials of client libraries on a served chat model; bridgework's own Python is not needed.

python trials.py --url http://127.0.0.1:8000/v1 --model llava [--key KEY] [openai litellm langchain]

Each trial calls the library as its documentation does and checks the answer. One JSON line each.
"""

import argparse
import asyncio
import base64
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

TOKENS = 6  # of an answer
SHORT: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Target:
    """The endpoint under trial."""

    url: str  # with /v1
    model: str
    key: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture()}"}}
        return [{"role": "user", "content": [shown, {"type": "text", "text": "What is it?"}]}]


Trial = Callable[[Target], object]


class Result(TypedDict):
    """Outcome of one trial, as a line of JSON has it."""

    library: str
    trial: str
    passed: bool
    detail: str  # the answer, or the exception


def picture() -> str:
    """Return a red PNG of 32 x 32 pixels in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        code = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + code

    rows = zlib.compress((b"\0" + b"\xc8\x1e\x1e" * 32) * 32)
    head = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


def expect(condition: object, what: object) -> None:
    if not condition:
        raise AssertionError(what)


def refused(call: Callable[[], object], kind: type[Exception]) -> str:
    """Return the message of the expected exception."""
    try:
        given = call()
    except kind as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    raise AssertionError(f"no {kind.__name__}: {given}")


# --- openai


def _client(target: Target) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=target.url, api_key=target.key, max_retries=0)


def _ask(target: Target, **changes: Any) -> Any:
    how = {"model": target.model, "messages": target.messages} | SHORT | changes
    return _client(target).chat.completions.create(**how)


def openai_answer(target: Target) -> object:
    answer = _ask(target)
    expect(answer.usage.completion_tokens <= TOKENS, answer.usage)
    expect(answer.choices[0].finish_reason in ("length", "stop"), answer)
    return answer.choices[0].message.content


def openai_stream(target: Target) -> object:
    pieces = list(_ask(target, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    expect(text == _ask(target).choices[0].message.content, text)
    expect(pieces[-1].usage.completion_tokens <= TOKENS, pieces[-1])
    return f"{len(pieces)} pieces"


def openai_stream_helper(target: Target) -> object:
    how = {"model": target.model, "messages": target.messages} | SHORT
    with _client(target).chat.completions.stream(**how) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    expect(text == _ask(target).choices[0].message.content, text)
    return text


def openai_async(target: Target) -> object:
    from openai import AsyncOpenAI

    async def several() -> list[str | None]:
        how = {"model": target.model, "messages": target.messages} | SHORT
        async with AsyncOpenAI(base_url=target.url, api_key=target.key, max_retries=0) as client:
            calls = [client.chat.completions.create(**how) for _ in range(4)]
            return [one.choices[0].message.content for one in await asyncio.gather(*calls)]

    texts = asyncio.run(several())
    expect(len(set(texts)) == 1, texts)
    return f"{len(texts)} equal answers"


def openai_next_turn(target: Target) -> object:
    message = _ask(target).choices[0].message
    for echoed in (message, message.model_dump()):
        turns = [*target.messages, echoed, {"role": "user", "content": "And now?"}]
        answer = _ask(target, messages=turns)
    return answer.choices[0].message.content


def openai_several(target: Target) -> object:
    answer = _ask(target, n=3, temperature=1.0, seed=1, logprobs=True, top_logprobs=2)
    expect([choice.index for choice in answer.choices] == [0, 1, 2], answer)
    expect(all(choice.logprobs.content for choice in answer.choices), answer)
    return "3 answers with logprobs"


def openai_parse(target: Target) -> object:
    from pydantic import BaseModel

    class Seen(BaseModel):
        color: Literal["red", "blue"]

    how: dict[str, Any] = {"model": target.model, "messages": target.messages, "temperature": 0}
    answer = _client(target).chat.completions.parse(**how, response_format=Seen, max_tokens=64)
    expect(isinstance(answer.choices[0].message.parsed, Seen), answer)
    return answer.choices[0].message.parsed


def openai_choice(target: Target) -> object:
    choices = ["a red square", "a dog"]
    answer = _ask(target, extra_body={"structured_outputs": {"choice": choices}})
    expect(answer.choices[0].message.content in choices, answer)
    return answer.choices[0].message.content


def openai_text_completion(target: Target) -> object:
    how: dict[str, Any] = {"model": target.model, "prompt": "A picture of"} | SHORT
    return _client(target).completions.create(**how).choices[0].text


def openai_models(target: Target) -> object:
    names = [one.id for one in _client(target).models.list()]
    expect(target.model in names, names)
    return names


def openai_tools(target: Target) -> object:
    from openai import BadRequestError

    return refused(lambda: _ask(target, tools=[TOOL]), BadRequestError)


def openai_unknown_model(target: Target) -> object:
    from openai import NotFoundError

    return refused(lambda: _ask(target, model="nope"), NotFoundError)


# --- litellm


def _lite(target: Target, **changes: Any) -> Any:
    import litellm

    litellm.suppress_debug_info = True
    how = {
        "model": f"openai/{target.model}", "api_base": target.url, "api_key": target.key,
        "messages": target.messages, "num_retries": 0,
    } | SHORT | changes  # fmt: skip
    return litellm.completion(**how)


def litellm_answer(target: Target) -> object:
    return _lite(target).choices[0].message.content


def litellm_hosted_vllm(target: Target) -> object:
    return _lite(target, model=f"hosted_vllm/{target.model}").choices[0].message.content


def litellm_stream(target: Target) -> object:
    pieces = list(_lite(target, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    expect(text == _lite(target).choices[0].message.content, text)
    expect(any(getattr(piece, "usage", None) for piece in pieces), pieces[-1])
    return f"{len(pieces)} pieces"


def litellm_next_turn(target: Target) -> object:
    message = _lite(target).choices[0].message
    for echoed in (message, message.model_dump()):
        turns = [*target.messages, echoed, {"role": "user", "content": "And now?"}]
        answer = _lite(target, messages=turns)
    return answer.choices[0].message.content


def litellm_unused_fields(target: Target) -> object:
    answer = _lite(target, frequency_penalty=0, user="me", drop_params=True)
    return answer.choices[0].message.content


def litellm_tools(target: Target) -> object:
    import litellm

    return refused(lambda: _lite(target, tools=[TOOL]), litellm.BadRequestError)


def litellm_unknown_model(target: Target) -> object:
    import litellm

    return refused(lambda: _lite(target, model="openai/nope"), litellm.NotFoundError)


# --- langchain-openai


def _lang(target: Target, **changes: Any) -> Any:
    from langchain_openai import ChatOpenAI

    how = {"model": target.model, "base_url": target.url, "api_key": target.key, "max_retries": 0}
    return ChatOpenAI(**how | SHORT | changes)


def _human(target: Target) -> Any:
    from langchain_core.messages import HumanMessage

    return HumanMessage(target.messages[0]["content"])


def langchain_answer(target: Target) -> object:
    answer = _lang(target).invoke([_human(target)])
    expect(answer.usage_metadata["output_tokens"] <= TOKENS, answer)
    return answer.content


def langchain_stream(target: Target) -> object:
    pieces = list(_lang(target).stream([_human(target)]))
    text = "".join(piece.content for piece in pieces)
    expect(text == _lang(target).invoke([_human(target)]).content, text)
    return f"{len(pieces)} pieces"


def langchain_image_block(target: Target) -> object:
    from langchain_core.messages import HumanMessage

    image = {"type": "image", "base64": picture(), "mime_type": "image/png"}
    message = HumanMessage([image, {"type": "text", "text": "What is it?"}])
    answer = _lang(target).invoke([message]).content
    expect(answer == _lang(target).invoke([_human(target)]).content, answer)
    return answer


def langchain_next_turn(target: Target) -> object:
    from langchain_core.messages import HumanMessage, SystemMessage

    chat, first = _lang(target), _human(target)
    turns = [SystemMessage("Be brief."), first, chat.invoke([first]), HumanMessage("And now?")]
    return chat.invoke(turns).content


def langchain_batch(target: Target) -> object:
    answers = {one.content for one in _lang(target).batch([[_human(target)]] * 4)}
    expect(len(answers) == 1, answers)
    return "4 equal answers"


def langchain_structured(target: Target) -> object:
    from pydantic import BaseModel

    class Seen(BaseModel):
        color: Literal["red", "blue"]

    chat = _lang(target, max_tokens=64).with_structured_output(Seen)
    seen = chat.invoke([_human(target)])
    expect(isinstance(seen, Seen), seen)
    return seen


TRIALS: Mapping[str, Mapping[str, Trial]] = {
    "openai": {
        "answer": openai_answer,
        "stream with usage": openai_stream,
        "stream helper": openai_stream_helper,
        "async client": openai_async,
        "answer sent back": openai_next_turn,
        "n and logprobs": openai_several,
        "parsed JSON": openai_parse,
        "choice": openai_choice,
        "text completion": openai_text_completion,
        "models": openai_models,
        "tools are refused": openai_tools,
        "unknown model": openai_unknown_model,
    },
    "litellm": {
        "answer": litellm_answer,
        "as hosted_vllm": litellm_hosted_vllm,
        "stream with usage": litellm_stream,
        "answer sent back": litellm_next_turn,
        "unused fields": litellm_unused_fields,
        "tools are refused": litellm_tools,
        "unknown model": litellm_unknown_model,
    },
    "langchain": {
        "answer with usage": langchain_answer,
        "stream": langchain_stream,
        "image block": langchain_image_block,
        "answer sent back": langchain_next_turn,
        "batch": langchain_batch,
        "structured output": langchain_structured,
    },
}


def results(target: Target, libraries: list[str]) -> list[Result]:
    """Run the trials of some libraries; a failure is a result too."""
    found: list[Result] = []
    for library in libraries:
        for name, trial in TRIALS[library].items():
            try:
                passed, detail = True, str(trial(target))
            except Exception as error:  # whatever a library raises
                passed, detail = False, f"{type(error).__name__}: {error}"
            found.append(
                {"library": library, "trial": name, "passed": passed, "detail": detail[:300]}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="*", help=f"of {', '.join(TRIALS)}; default: all")
    parser.add_argument("--url", required=True, help="with /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--key", default=os.environ.get("BRIDGEWORK_KEY", "none"))
    given = parser.parse_args()
    if unknown := set(given.libraries) - set(TRIALS):
        parser.error(f"libraries: unknown. Got {', '.join(unknown)}; expected {', '.join(TRIALS)}")
    found = results(Target(given.url, given.model, given.key), given.libraries or list(TRIALS))
    for one in found:
        print(json.dumps(one))
    sys.exit(not all(one["passed"] for one in found))


if __name__ == "__main__":
    main()
