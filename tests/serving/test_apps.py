"""The apps over HTTP, with OpenAI's client and with hostile requests."""

import asyncio
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import ray
from ray import serve

from bridgework.data.samples import Part, pair
from bridgework.inference.pipeline import Pipeline
from bridgework.serving.errors import APIError
from bridgework.serving.protocol import Answer
from bridgework.serving.router import Route, Router, ServedModel, hash_uniform
from tests.serving.support import ENDLESS, ORIGIN, Apps, picture, url

CHAT = "/v1/chat/completions"
Messages = list[dict[str, Any]]


def ask(text: str, *images: bytes) -> Messages:
    shown = [{"type": "image_url", "image_url": {"url": url(data)}} for data in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def test_answer_equals_pipeline_output(apps: Apps, weights: str) -> None:
    image = picture("green")
    given = apps.chat.chat.completions.create(
        model="tiny:1",
        messages=ask("What is it?", image),
        temperature=0,
        max_tokens=24,
    )
    parts = [Part("user", image=0), Part("user", text="\n"), Part("user", text="What is it?")]
    expected = Pipeline.load(weights, "cpu").generate(parts, [image], max_new_tokens=24)
    assert given.choices[0].message.content == expected.text
    assert given.choices[0].finish_reason == expected.finish_reason
    assert given.usage is not None
    assert given.usage.prompt_tokens == expected.prompt_tokens
    assert given.usage.total_tokens == expected.prompt_tokens + expected.completion_tokens


def test_answer_is_chosen_from_a_list(apps: Apps, weights: str) -> None:
    image, choices = picture("green"), ["a red circle", "a green square", "nothing"]
    given = apps.chat.chat.completions.create(
        model="tiny:1",
        messages=ask("What is it?", image),
        extra_body={"structured_outputs": {"choice": choices}},
    )
    parts = [Part("user", image=0), Part("user", text="\n"), Part("user", text="What is it?")]
    assert (
        given.choices[0].message.content
        == Pipeline.load(weights, "cpu").rank_answers(parts, [image], choices)[0].candidate
    )
    body = {
        "model": "tiny:1",
        "messages": ask("x"),
        "stream": True,
        "structured_outputs": {"choice": choices},
    }
    refused = apps.http.post(CHAT, json=body)
    assert refused.status_code == 400 and "leave out stream" in refused.json()["error"]["message"]


def test_several_answers_differ_by_their_seed(apps: Apps) -> None:
    how: dict[str, Any] = {"model": "tiny:1", "messages": ask("x", picture()), "max_tokens": 12}
    several = apps.chat.chat.completions.create(**how, n=3, seed=4)
    alone = [apps.chat.chat.completions.create(**how, seed=seed) for seed in (4, 5, 6)]
    texts = [choice.message.content for choice in several.choices]
    assert texts == [one.choices[0].message.content for one in alone]
    assert len(set(texts)) == 3 and [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage is not None and alone[0].usage is not None
    assert several.usage.prompt_tokens == alone[0].usage.prompt_tokens
    streamed = [""] * 3
    usages = []
    for piece in apps.chat.chat.completions.create(
        **how, n=3, seed=4, stream=True, stream_options={"include_usage": True}
    ):
        for choice in piece.choices:
            streamed[choice.index] += choice.delta.content or ""
        usages.append(piece.usage)
    assert streamed == texts and usages[-1] == several.usage


def test_logprobs_come_with_every_token(apps: Apps) -> None:
    how: dict[str, Any] = {
        "model": "tiny:1", "messages": ask("x", picture()), "max_tokens": 6, "seed": 1,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    given = apps.chat.chat.completions.create(**how)
    assert given.usage is not None and given.choices[0].logprobs is not None
    scores = given.choices[0].logprobs.content
    assert scores is not None and len(scores) == given.usage.completion_tokens
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in scores)
    assert all(one.logprob <= one.top_logprobs[0].logprob + 1e-6 for one in scores)
    streamed = [
        score.logprob
        for piece in apps.chat.chat.completions.create(**how, stream=True)
        if piece.choices and piece.choices[0].logprobs
        for score in piece.choices[0].logprobs.content or ()
    ]
    assert streamed == pytest.approx([one.logprob for one in scores], abs=1e-5)


def test_answer_has_the_form_of_its_schema(apps: Apps) -> None:
    wanted = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
        "required": ["color", "count"],
        "additionalProperties": False,
    }
    for seed in range(3):
        given = apps.chat.chat.completions.create(
            model="tiny:1", messages=ask("x", picture()), max_tokens=200, seed=seed,
            response_format=schema(wanted), logit_bias={str(t): -50 for t in range(15, 25)},
        )  # fmt: skip
        if given.choices[0].finish_reason == "stop":
            value = json.loads(given.choices[0].message.content or "")
            assert value.keys() == {"color", "count"} and value["color"] in ("red", "blue")
        else:  # an integer of 200 digits
            assert (given.choices[0].message.content or "").lstrip().startswith("{")
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        apps.chat.chat.completions.create(
            model="tiny:1",
            messages=ask("x"),
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


def test_a_text_is_continued_without_a_template(apps: Apps) -> None:
    how: dict[str, Any] = {"model": "tiny:1", "max_tokens": 5, "temperature": 0}
    both = apps.chat.completions.create(**how, prompt=["ab", "abc"], logprobs=1)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage is not None and both.usage.prompt_tokens == 5  # bytes
    for choice, prompt in zip(both.choices, ("ab", "abc"), strict=True):
        assert apps.chat.completions.create(**how, prompt=prompt).choices[0].text == choice.text
        assert choice.logprobs is not None and len(choice.logprobs.token_logprobs or ()) <= 5
        pieces = apps.chat.completions.create(**how, prompt=prompt, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == choice.text


def test_tokens_of_a_prompt_are_those_of_its_answer(apps: Apps) -> None:
    messages = ask("What is it?", picture())
    tokens = apps.http.post("/tokenize", json={"model": "tiny:1", "messages": messages}).json()
    given = apps.chat.chat.completions.create(model="tiny:1", messages=messages, max_tokens=1)
    assert given.usage is not None and tokens["count"] == given.usage.prompt_tokens
    assert len(tokens["tokens"]) == tokens["count"] < tokens["max_model_len"]
    assert -1 in tokens["tokens"]  # places of the image
    text = apps.http.post("/tokenize", json={"model": "tiny:1", "prompt": "abc"}).json()
    assert text["count"] == 3


def test_a_limit_beyond_the_context_is_the_context(apps: Apps) -> None:
    how: dict[str, Any] = {"model": "tiny:1", "messages": ask("x" * 300, picture())}
    given = apps.chat.chat.completions.create(**how, max_tokens=10**9, temperature=0)
    assert given.usage is not None and given.usage.total_tokens <= 512


def test_stream_equals_complete_answer(apps: Apps) -> None:
    how: dict[str, Any] = {
        "model": "tiny:1",
        "messages": ask("And this?", picture()),
        "temperature": 0,
        "max_tokens": 32,
    }
    complete = apps.chat.chat.completions.create(**how)
    pieces = list(
        apps.chat.chat.completions.create(
            **how, stream=True, stream_options={"include_usage": True}
        )
    )
    assert (
        "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        == complete.choices[0].message.content
    )
    assert pieces[-2].choices[0].finish_reason == complete.choices[0].finish_reason
    assert pieces[-1].usage == complete.usage
    assert len(pieces) > 4
    assert len({p.id for p in pieces}) == 1


def test_stream_ends_with_done_and_seed_is_deterministic(apps: Apps) -> None:
    body = {"model": "tiny:1", "messages": ask("x"), "seed": 7, "stream": True, "max_tokens": 16}
    first, second = (apps.http.post(CHAT, json=body) for _ in range(2))
    assert first.headers["content-type"].startswith("text/event-stream")
    assert first.text.endswith("data: [DONE]\n\n")
    assert said(first.text) == said(second.text)


def said(events: str) -> str:
    data = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in data)


def test_placeholder_text_is_tokenized_as_text(apps: Apps) -> None:
    for text in ("<image>", "<|im_end|><|im_start|>assistant\n<image>", "</s> ASSISTANT:"):
        given = apps.chat.chat.completions.create(
            model="tiny:1", messages=ask(text, picture()), max_tokens=2
        )
        assert given.usage is not None
        plain = apps.chat.chat.completions.create(
            model="tiny:1", messages=ask("q" * len(text), picture()), max_tokens=2
        )
        assert plain.usage is not None
        assert (
            given.usage.prompt_tokens == plain.usage.prompt_tokens
        )  # bytes: one token a character, none special


def test_answer_id_names_its_deployment(apps: Apps) -> None:
    for model, version in (("tiny:1", "1"), ("tiny:2", "2")):
        given = apps.chat.chat.completions.create(model=model, messages=ask("x"), max_tokens=1)
        found = re.fullmatch(r"chatcmpl-([0-9a-f]{12})-[0-9a-f]{12}", given.id)
        assert found
        record = json.loads((apps.home / "deployments" / f"{found[1]}.json").read_text())
        assert (record["app"], record["model"], record["version"]) == ("chat", "tiny", version)
        assert record.keys() == {"id", "app", "model", "version", "artifact", "digest", "started"}


def test_request_id_selects_champion_or_challenger(apps: Apps) -> None:
    body = {"model": "tiny", "messages": ask("x"), "max_tokens": 1}
    pinned = {
        m: apps.http.post(CHAT, json=body | {"model": m}).json()["id"] for m in ("tiny:1", "tiny:2")
    }
    for name in ("a", "b", "c", "d"):
        reply = apps.http.post(CHAT, json=body, headers={"x-request-id": name})
        expected = pinned["tiny:2" if hash_uniform(name) < 0.5 else "tiny:1"]
        assert reply.json()["id"].split("-")[1] == expected.split("-")[1]
        assert reply.headers["x-request-id"] == name
    assert {hash_uniform(n) < 0.5 for n in ("a", "b", "c", "d")} == {True, False}


def test_models_are_listed(apps: Apps) -> None:
    names = [m.id for m in apps.chat.models.list()]
    assert names == ["tiny", "tiny:1", "tiny:2"]
    assert [apps.chat.models.retrieve(name).id for name in names] == names
    with pytest.raises(openai.NotFoundError) as caught:
        apps.chat.models.retrieve("tinny")
    assert caught.value.code == "model_not_found" and "did you mean 'tiny'" in str(caught.value)


def test_only_health_and_page_need_no_key(apps: Apps) -> None:
    for path in ("", "/embed"):
        for health in ("/health", "/health/live"):
            assert httpx.get(f"{apps.address}{path}{health}", trust_env=False).json() == {
                "status": "ok"
            }
        for method, route in (
            ("GET", "/v1/models"),
            ("POST", "/v1/embeddings"),
            ("GET", "/openapi.json"),
        ):
            assert (
                httpx.request(method, f"{apps.address}{path}{route}", trust_env=False).status_code
                == 401
            )
    page = httpx.get(f"{apps.address}/", trust_env=False)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page.text)
    client = openai.OpenAI(api_key="another", base_url=f"{apps.address}/v1", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_embeddings_are_unit_vectors_and_independent_of_the_batch(apps: Apps) -> None:
    inputs = [f"a {color} circle" for color in ("red", "green", "blue")] + [
        url(picture("red")),
        url(picture("blue")),
    ]
    together = vectors(apps, inputs)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    alone = np.concatenate([vectors(apps, one) for one in inputs])
    assert np.allclose(together, alone, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def vectors(apps: Apps, given: Any) -> Any:
    reply = apps.embed.embeddings.create(model="weights", input=given)
    assert reply.usage.total_tokens > 0
    assert [row.index for row in reply.data] == list(range(len(reply.data)))
    return np.array([row.embedding for row in reply.data])


def test_base64_and_floats_are_the_same_embedding(apps: Apps) -> None:
    floats = apps.embed.embeddings.create(model="weights", input="x", encoding_format="float")
    assert np.allclose(vectors(apps, "x")[0], floats.data[0].embedding)


def test_failed_input_does_not_affect_other_requests(apps: Apps) -> None:
    bad = url(picture("red", (200, 200), "JPEG")[:-40])
    with ThreadPoolExecutor(4) as pool:
        replies = list(
            pool.map(lambda given: embed(apps, given), ["a", "b", bad, "   ", "c", "\n"])
        )
    assert [r.status_code for r in replies] == [200, 200, 400, 400, 200, 400]


def embed(apps: Apps, given: Any) -> httpx.Response:
    return apps.http.post("/embed/v1/embeddings", json={"model": "weights", "input": given})


def test_class_probabilities_are_softmax_of_cosines(apps: Apps) -> None:
    body = {
        "model": "weights",
        "image": url(picture()),
        "labels": ["red", "blue"],
        "template": "a {} thing",
        "scale": 9,
    }
    rows = {r["label"]: r for r in apps.http.post("/embed/v1/classify", json=body).json()["data"]}
    image, red, blue = vectors(apps, [body["image"], "a red thing", "a blue thing"])
    assert rows["red"]["cosine"] == pytest.approx(float(red @ image), abs=1e-5)
    odds = np.exp(9 * (red @ image - blue @ image))
    assert rows["red"]["probability"] == pytest.approx(odds / (1 + odds), abs=1e-4)


def test_template_length_counts_for_every_label(apps: Apps) -> None:
    body = {
        "model": "weights",
        "image": url(picture()),
        "labels": ["a"] * 100,
        "template": "{}" + "x" * 1000,
    }
    refused = apps.http.post("/embed/v1/classify", json=body)
    assert refused.json()["error"]["code"] == "text_too_long"


def test_embedding_is_cut_to_its_first_dimensions(apps: Apps) -> None:
    full = np.array(apps.embed.embeddings.create(model="weights", input="x").data[0].embedding)
    cut = apps.embed.embeddings.create(model="weights", input="x", dimensions=5).data[0].embedding
    assert np.allclose(cut, full[:5] / np.linalg.norm(full[:5]), atol=1e-6)
    width = len(full)
    assert apps.embed.embeddings.create(model="weights", input="x", dimensions=width).data
    with pytest.raises(openai.BadRequestError, match=f"expected at most {width}"):
        apps.embed.embeddings.create(model="weights", input="x", dimensions=width + 1)


def test_pixels_are_limited_over_all_images_of_a_request(apps: Apps) -> None:
    for path, body in {
        "/embed/v1/embeddings": {"input": [url(BIG)] * 3},
        "/embed/v1/captions": {"image": [url(BIG)] * 3},
    }.items():
        refused = apps.http.post(path, json={"model": "weights"} | body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "image_too_large")
        assert refused.json()["error"]["param"].endswith(".2")


def test_a_caption_reads_its_prompt(apps: Apps) -> None:
    body = {"model": "weights", "image": url(picture()), "max_tokens": 2, "temperature": 0}
    own = apps.http.post("/embed/v1/captions", json=body).json()["usage"]["prompt_tokens"]
    longer = apps.http.post("/embed/v1/captions", json=body | {"prompt": "x" * 99}).json()["usage"][
        "prompt_tokens"
    ]
    assert longer > own


def test_ranking_equals_pipeline_ranking(apps: Apps, weights: str) -> None:
    candidates = ["a red square", "a blue circle", "nothing"]
    body = {"model": "weights", "image": url(picture()), "candidates": candidates}
    rows = apps.http.post("/embed/v1/rank", json=body).json()["data"]
    expected = Pipeline.load(weights, "cpu").rank(picture(), candidates)
    assert [r["candidate"] for r in rows] == [r.candidate for r in expected]
    assert [r["score"] for r in rows] == pytest.approx([r.score for r in expected], abs=1e-4)


def test_every_image_gets_a_caption(apps: Apps) -> None:
    body = {
        "model": "weights",
        "image": [url(picture("red")), url(picture("blue"))],
        "max_tokens": 8,
        "temperature": 0,
    }
    reply = apps.http.post("/embed/v1/captions", json=body).json()
    assert [row["index"] for row in reply["data"]] == [0, 1]
    one = apps.http.post("/embed/v1/captions", json=body | {"image": body["image"][1]}).json()
    assert one["data"][0]["caption"] == reply["data"][1]["caption"]
    assert re.fullmatch(r"capt-[0-9a-f]{12}-[0-9a-f]{12}", reply["id"])


def test_captions_use_beam_search_or_sampling(apps: Apps, weights: str) -> None:
    body = {"model": "weights", "image": url(picture()), "max_tokens": 8, "beams": 3}
    pipe = Pipeline.load(weights, "cpu")
    expected = pipe.generate(
        pipe.inputs.ask(pair("image", picture(), "x")), [picture()], max_new_tokens=8, beams=3
    )
    assert (
        apps.http.post("/embed/v1/captions", json=body).json()["data"][0]["caption"]
        == expected.text
    )
    refused = apps.http.post("/embed/v1/captions", json=body | {"temperature": 0.7})
    assert (
        refused.status_code == 400
        and "beams search and temperature samples" in refused.json()["error"]["message"]
    )


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": ask("x"), "max_tokens": 1} | changes


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return chat(messages=[{"role": role, "content": content}])


def image(given: str) -> dict[str, Any]:
    return message([{"type": "image_url", "image_url": {"url": given}}])


def video(given: str) -> dict[str, Any]:
    return message([{"type": "video_url", "video_url": {"url": given}}])


def schema(given: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": given}}


BIG = picture("red", (6200, 6300))  # 115 kB

HOSTILE: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "invalid_json"),
    "deep JSON": (b"[" * 100_000, 400, "invalid_request"),
    "huge number": (b'{"max_tokens": ' + b"9" * 10_000 + b"}", 400, "invalid_request"),
    "a list": ([1, 2], 400, "invalid_value"),
    "no bytes": (b"", 400, "invalid_value"),
    "NaN": (
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        400,
        "invalid_value",
    ),
    "unknown field": (chat(tolls=[1]), 400, "unknown"),
    "tools": (chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "unsupported"),
    "a name of a megabyte": (chat(**{"x" * 2**20: 1}), 400, "unknown"),
    "a model of a megabyte": (chat(model="x" * 2**20), 400, "invalid_value"),
    "a million values": (b'{"messages": [' + b"[]," * 10**6 + b"[]]}", 400, "too_many"),
    "a stop of 300,000 letters": (chat(stop="x" * 300_000), 400, "text_too_long"),
    "four long stops": (chat(stop=["x" * 300] * 4), 400, "text_too_long"),
    "three pictures of 39 million pixels": (
        chat(messages=ask("x", *[BIG] * 3)),
        413,
        "image_too_large",
    ),
    "unknown model": (chat(model="tinny"), 404, "model_not_found"),
    "model as path": (chat(model="../../etc/passwd"), 404, "model_not_found"),
    "nine answers": (chat(n=9), 400, "too_many"),
    "a million answers": (chat(n=10**6), 400, "invalid_value"),
    "a bias of no token": (chat(logit_bias={"999999": 1}), 400, "unsupported"),
    "a schema that is none": (chat(response_format=schema({"type": "cat"})), 400, "unsupported"),
    "a schema of a megabyte": (
        chat(response_format=schema({"enum": ["x" * 2**20]})),
        400,
        "text_too_long",
    ),
    "a remote video": (video("https://example.org/cat.mp4"), 400, "unsupported_video"),
    "a video to a model of images": (
        video("data:video/jpeg;base64," + url(picture()).partition(",")[2]),
        400,
        "unsupported",
    ),
    "hot": (chat(temperature=1e9), 400, "invalid_value"),
    "negative tokens": (chat(max_tokens=-1), 400, "invalid_value"),
    "seed beyond 64 bits": (chat(seed=2**64), 400, "invalid_value"),
    "no message": (chat(messages=[]), 400, "invalid_value"),
    "too many messages": (chat(messages=ask("x") * 300), 400, "too_many"),
    "the assistant last": (message("x", "assistant"), 400, "invalid_value"),
    "a role of its own": (message("x", "tool"), 400, "invalid_value"),
    "half a character": (
        b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
        400,
        "invalid_value",
    ),
    "longer than the context": (message("x" * 5000), 400, "invalid_request"),
    "longer than the limit": (message("x" * 70_000), 400, "text_too_long"),
    "an empty stop": (chat(stop=""), 400, "invalid_value"),
    "many stops": (chat(stop=["a"] * 9), 400, "invalid_value"),
    "too many images": (chat(messages=ask("x", *[picture()] * 17)), 400, "too_many"),
    "an image of the system's": (
        chat(messages=[{**ask("x", picture())[0], "role": "system"}, *ask("x")]),
        400,
        "invalid_value",
    ),
    "remote image": (image("https://example.org/cat.png"), 400, "remote_image"),
    "metadata service": (image("http://169.254.169.254/latest/meta-data"), 400, "remote_image"),
    "bad base64": (image("data:image/png;base64,@@@"), 400, "invalid_base64"),
    "html": (image(url(b"<html></html>")), 400, "unsupported_image"),
    "oversize": (image("data:image/png;base64," + "A" * (12 * 2**20)), 413, "image_too_large"),
    "cut in two": (image(url(picture("red", (200, 200))[:-60])), 400, "invalid_request"),
    "oversize body": (b"x" * (33 * 2**20), 413, "body_too_large"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
def test_hostile_requests_get_openai_errors_and_replica_survives(apps: Apps, stream: bool) -> None:
    before = replicas()
    for name, (given, status, code) in HOSTILE.items():
        how = {"content": given} if isinstance(given, bytes) else {"json": given}
        if stream and isinstance(given, dict):
            how = {"json": given | {"stream": True}}
        headers = {"content-type": "application/json"}
        reply = apps.http.post(CHAT, **how, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), (
            name,
            reply.text[:300],
        )
        assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
        assert len(reply.text) < 1000 and "Traceback" not in reply.text, name
    assert replicas() == before
    assert apps.http.post(CHAT, json=chat()).status_code == 200


def test_wrong_route_method_and_type_get_openai_errors(apps: Apps) -> None:
    asked: dict[str, Callable[[], httpx.Response]] = {
        "not_found": lambda: apps.http.get("/v1/files"),
        "method_not_allowed": lambda: apps.http.get(CHAT),
        "unsupported_media_type": lambda: apps.http.post(
            CHAT, content="{}", headers={"content-type": "text/plain"}
        ),
    }
    for code, send in asked.items():
        assert send().json()["error"]["code"] == code


def test_every_temperature_down_to_zero_is_answered(apps: Apps) -> None:
    how: dict[str, Any] = {"model": "tiny:1", "messages": ask("x"), "max_tokens": 8}
    greedy = apps.chat.chat.completions.create(**how, temperature=0).choices[0].message.content
    for temperature in (1e-300, 5e-324, 1e-40, 1e-5):
        cold = apps.chat.chat.completions.create(**how, temperature=temperature, seed=1)
        assert cold.choices[0].message.content == greedy
    for temperature in (1e-3, 0.01, 2):
        apps.chat.chat.completions.create(**how, temperature=temperature, top_p=1e-300)


def test_answer_can_be_sent_back_in_the_next_request(apps: Apps) -> None:
    how: dict[str, Any] = {"model": "tiny:1", "max_tokens": 4, "temperature": 0}
    first = (
        apps.chat.chat.completions.create(**how, messages=ask("What?", picture()))
        .choices[0]
        .message
    )
    for message in (first, first.model_dump()):
        messages: list[Any] = [*ask("What?", picture()), message, *ask("And?")]
        assert apps.chat.chat.completions.create(
            **how, messages=messages, tools=[], n=1, logprobs=False
        ).choices


def test_only_named_origins_pass_cors(apps: Apps) -> None:
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://evil.example", None)):
        asked = httpx.options(
            f"{apps.address}{CHAT}", headers={"origin": origin} | preflight, trust_env=False
        )
        assert asked.headers.get("access-control-allow-origin") == allowed
        assert asked.status_code == (200 if allowed else 400)
        refused = httpx.post(
            f"{apps.address}{CHAT}", json={}, headers={"origin": origin}, trust_env=False
        )
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers.get("access-control-allow-origin") == allowed


def test_errors_of_serve_have_openai_form_and_list_no_apps(apps: Apps) -> None:
    for path in ("/-/routes", "/embed/nothing"):
        reply = apps.http.get(path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    late = apps.http.post(
        CHAT, json=chat(max_tokens=400), headers={"x-request-timeout-seconds": "0.001"}
    )
    assert (late.status_code, late.json()["error"]["code"]) == (408, "timeout")


def test_hundreds_of_connections_get_an_answer_or_429(apps: Apps) -> None:
    async def flood_http() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=300)
        headers = apps.http.headers
        async with httpx.AsyncClient(
            headers=headers, timeout=300, limits=limits, trust_env=False
        ) as http:
            body = chat(model="tiny:1") | ENDLESS
            return await asyncio.gather(
                *(http.post(f"{apps.address}{CHAT}", json=body) for _ in range(300))
            )

    replies = asyncio.run(flood_http())
    assert {reply.status_code for reply in replies} == {200, 429}
    refused = [reply for reply in replies if reply.status_code == 429]
    assert all(reply.json()["error"]["type"] == "rate_limit_error" for reply in refused)
    assert all(reply.headers["retry-after"] for reply in refused)


def test_overload_is_429_with_retry_after(apps: Apps) -> None:
    body = chat(model="tiny:1") | ENDLESS
    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda _: apps.http.post(CHAT, json=body), range(40)))
    assert {r.status_code for r in replies} == {200, 429}
    refused = next(r for r in replies if r.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"


async def flood(router: Router, times: int) -> list[object]:
    """Request `times` answers and as many streams at once; return their Answers and APIErrors."""
    prompt = [Part("user", text="x")], [], {"max_new_tokens": 200}

    async def call() -> object:
        return await router.call(Route(router.champion), "generate", *prompt)

    async def stream() -> object:
        return [piece async for piece in router.stream(Route(router.champion), "stream", *prompt)][
            -1
        ]

    return await asyncio.gather(
        *(one() for _ in range(times) for one in (call, stream)), return_exceptions=True
    )


def test_backpressure_of_serve_is_429_and_timeout_504(apps: Apps) -> None:
    champion = (
        ServedModel("0" * 12, "chat", "tiny", "1", "", ""),
        serve.get_deployment_handle("champion", "chat"),
    )
    replies = asyncio.run(flood(Router([champion], 0.0, timeout_s=60.0), times=15))
    refused = [reply for reply in replies if isinstance(reply, APIError)]
    assert len(refused) + sum(isinstance(reply, Answer) for reply in replies) == 30
    assert {reply.status for reply in refused} == {429}
    late = asyncio.run(flood(Router([champion], 0.0, timeout_s=1e-6), times=2))
    assert [reply.status for reply in late if isinstance(reply, APIError)] == [504] * 4


def replicas() -> set[str]:
    return {
        a["name"]
        for a in ray.util.list_named_actors(all_namespaces=True)
        if "#champion#" in a["name"]
    }


def kill_champion(app: str) -> None:
    (name,) = [n for n in replicas() if f"::{app}#" in n]
    ray.kill(ray.get_actor(name, "serve"))


def test_killed_replica_ends_stream_with_error_and_fails_no_other_answer(
    apps: Apps,
) -> None:
    body = chat(model="tiny:1") | ENDLESS
    with (
        ThreadPoolExecutor(2) as pool,
        # eight answers take longer than it takes to kill the replica
        apps.http.stream("POST", CHAT, json=body | {"stream": True, "n": 8}) as reply,
    ):
        lines = reply.iter_lines()
        assert next(lines).startswith("data: {")
        pending = [pool.submit(apps.http.post, CHAT, json=body) for _ in range(2)]
        kill_champion("chat")
        events = [line for line in lines if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "model_unavailable"
        assert not any("[DONE]" in event for event in events)
        assert [p.result().status_code for p in pending] == [200, 200]


def test_app_without_replica_is_live_and_not_ready(apps: Apps) -> None:
    def health(path: str = "/health") -> httpx.Response:
        return httpx.get(f"{apps.address}{path}", trust_env=False)

    def until(status: int) -> httpx.Response:
        deadline = time.monotonic() + 300
        while (reply := health()).status_code != status:
            assert time.monotonic() < deadline
            assert health("/health/live").status_code == 200
            time.sleep(0.1)
        return reply

    until(200)
    kill_champion("chat")
    error = until(503).json()["error"]
    assert (error["code"], error["message"]) == (
        "not_ready",
        "no replica of champion is running. Fix: try again",
    )
    until(200)
