"""Two replicas of one model: requests about an image share caches, and a death fails no answer."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from bridgework.serving import launch
from tests.serving.support import picture, url

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def http(ray_session: None, home: Path, weights: str) -> Iterator[httpx.Client]:
    args = {"model": weights, "replicas": 2, "cpus": 0.25, "home": str(home), "dev": True}
    address = launch.AppAddress(port=launch.free_port(), name="two")
    endpoint = launch.start("chat", args, address)
    with httpx.Client(base_url=endpoint.address, timeout=300, trust_env=False) as client:
        yield client
    serve.shutdown()


def body(weights: str, color: str, question: str, **fields: Any) -> dict[str, Any]:
    shown = {"type": "image_url", "image_url": {"url": url(picture(color))}}
    content = [shown, {"type": "text", "text": question}]
    given = {"model": Path(weights).name, "max_tokens": 2, "temperature": 0}
    return given | {"messages": [{"role": "user", "content": content}]} | fields


def replicas() -> list[str]:
    return sorted(
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "#champion#" in actor["name"]
    )


def cached(http: httpx.Client) -> dict[str, tuple[float, float]]:
    """(images, those that were cached) of each replica, from its metrics."""
    found: dict[str, list[float]] = {}
    for line in http.get("/metrics").text.splitlines():
        for i, name in enumerate(("vllm:mm_cache_queries_total", "vllm:mm_cache_hits_total")):
            if line.startswith(name + "{"):
                engine = line.partition('engine="')[2].partition('"')[0]
                found.setdefault(engine, [0.0, 0.0])[i] = float(line.split()[-1])
    return {engine: (queries, hits) for engine, (queries, hits) in found.items()}


def test_questions_about_one_image_reach_one_replica(http: httpx.Client, weights: str) -> None:
    colors = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange"]
    for question in ("What?", "Where is it?", "Who?"):
        for color in colors:
            assert http.post(CHAT, json=body(weights, color, question)).status_code == 200
    counts = cached(http)
    assert len(counts) == 2 and sum(queries for queries, _ in counts.values()) == 24
    assert sum(hits for _, hits in counts.values()) == 16  # all but the first question of each
    assert all(queries for queries, _ in counts.values())  # both replicas have images


def test_no_answer_fails_when_one_of_two_replicas_dies(http: httpx.Client, weights: str) -> None:
    colors = ["red", "green", "blue", "white", "black", "yellow", "purple", "orange"]
    long = {"max_tokens": 60, "temperature": 1.0}
    with ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(http.post, CHAT, json=body(weights, colors[i % 8], f"What {i}?", **long))
            for i in range(32)
        ]
        time.sleep(0.5)
        ray.kill(ray.get_actor(replicas()[0], "serve"))
        assert Counter(answer.result().status_code for answer in answers) == {200: 32}
