"""Who writes texts: what an endpoint may answer, and what becomes of an answer that is none."""

import re
from typing import Any

import pytest

from bridgework.curation import llm
from bridgework.errors import RunError
from tests.curation.models import completion, endpoint

HELLO = [{"role": "user", "content": "hello"}]

NO_COMPLETIONS = {  # bodies of answers of status 200, and what is shown of them
    b'{"choices": null}': '{"choices": null}',
    b'{"choices": []}': '{"choices": []}',
    b'{"choices": [{"text": "a completion of old"}]}': '{"choices": [{"text": "a completion of old"}]}',
    completion({"text": "no text, no list"}): '{"choices": [{"index": 0, ',
    completion(["bare"]): '{"choices": [{"index": 0, ',
    b'["a", "list"]': '["a", "list"]',
    b'{"error": {"message": "the model is loading"}}': "the model is loading",
    b"so sorry": "so sorry",
    b"<html>\n<body>Sign in</body>\n"
    + b"<br>" * 1000
    + b"</html>": "<html> <body>Sign in</body> <br><br>",
    b"[" * 200_000: "[[[",
    b"": "an empty answer",
}


@pytest.mark.parametrize(("body", "shown"), NO_COMPLETIONS.items(), ids=range(len(NO_COMPLETIONS)))
def test_malformed_completion_raises_with_its_text(body: bytes, shown: str) -> None:
    with endpoint(lambda request: body) as server, pytest.raises(RunError) as caught:
        llm.ChatEndpoint(server.url, "m", attempts=1)(HELLO, 0)
    told = str(caught.value)
    assert told.startswith(f"{server.url} answers with no chat completion. Got: ") and shown in told
    assert (
        ". Fix: check the URL (up to /v1), the model's name" in told
        and "\n" not in told
        and len(told) < 500
    )


def test_malformed_completion_is_retried() -> None:
    bodies = iter([b"<html>busy</html>", b'{"choices": null}', completion("Yes.")])
    with endpoint(lambda request: next(bodies)) as server:
        assert llm.ChatEndpoint(server.url, "m", attempts=3)(HELLO, 0) == "Yes."
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ([], ""),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "refusal", "refusal": "no"}], ""),
        (
            [
                {"type": "text", "text": "A "},
                {"type": "thinking"},
                {"type": "text", "text": "flag. "},
            ],
            "A flag.",
        ),
        ("half a smile \ud83d", "half a smile ?"),
    ],
)
def test_message_may_have_parts_or_no_text(content: Any, text: str) -> None:
    with endpoint(lambda request: completion(content)) as server:
        assert llm.ChatEndpoint(server.url, "m", attempts=1)(HELLO, 0) == text
    assert len(server.asked) == 1
    assert llm.parse_completion('{"choices": [{"message": {"role": "assistant"}}]}') == ""


@pytest.mark.parametrize(("status", "asked"), [(401, 1), (404, 1), (503, 2)])
def test_rejected_api_key_ends_the_run(status: int, asked: int) -> None:
    with endpoint(lambda request: status) as server:
        client = llm.ChatEndpoint(server.url, "m", key="NO_KEY", attempts=2)
        with pytest.raises(
            RunError, match=rf"{re.escape(server.url)} does not answer. Got.*key in \$NO_KEY"
        ):
            client(HELLO, 0)
    assert len(server.asked) == asked
    with pytest.raises(RunError, match=r"does not answer\. Got: Connection error"):
        llm.ChatEndpoint(server.url, "m", attempts=1)(HELLO, 0)
