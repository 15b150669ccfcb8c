"""Two replicas: an image selects one of them, a busy or lost one is replaced by the other."""

import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bridgework.serving.affinity import ranked
from bridgework.serving.router import Route, ServedModel
from tests.serving.support import ENDLESS, ServeChat, picture, until, url

CHAT = "/v1/chat/completions"
IMAGES = [f"image {number}" for number in range(400)]
IDLE = dict.fromkeys("abcd", 0)


def test_an_image_selects_a_replica_and_the_images_are_spread() -> None:
    first = [ranked(image, IDLE, 4)[0] for image in IMAGES]
    assert first == [ranked(image, dict(reversed(IDLE.items())), 4)[0] for image in IMAGES]
    assert all(60 < count < 140 for count in Counter(first).values())


def test_a_lost_replica_moves_only_its_own_images() -> None:
    left = {name: queue for name, queue in IDLE.items() if name != "c"}
    for image in IMAGES:
        before, after = ranked(image, IDLE, 4), ranked(image, left, 4)
        assert after == [name for name in before if name != "c"]


def test_a_busy_replica_is_the_last_choice() -> None:
    for image in IMAGES:
        first, second, *others = ranked(image, IDLE, 4)
        assert ranked(image, IDLE | {first: 4}, 4)[0] == first
        assert ranked(image, IDLE | {first: 5}, 4) == [second, *others, first]
        everyone = dict.fromkeys(IDLE, 30)  # equally busy
        assert ranked(image, everyone | {first: 34}, 4)[0] == first


def test_the_first_image_decides_and_text_alone_does_not() -> None:
    route = Route(ServedModel("0" * 12, "chat", "m", "1", "", ""))
    one, other = picture("red"), picture("blue")
    assert route.about([one]) == route.about([one, other]) == route.about([(one, other)])
    assert route.about([one]).image != route.about([other]).image
    assert route.about([]) == route


@pytest.fixture(scope="module")
def http(serve_chat: ServeChat, home: Path, weights: str) -> Iterator[httpx.Client]:
    """Two replicas that decode two answers at once; 4 requests more are busy."""
    options: dict[str, Any] = {"replicas": 2, "ongoing": 16, "engine.rows": 2, "queued": 64}
    with serve_chat(home, model=weights, **options) as client:
        yield client


def ask(http: httpx.Client, number: int, text: str = "x", **changes: Any) -> int:
    """Ask about the picture of a number; return the status."""
    shown = {"type": "image_url", "image_url": {"url": url(picture("red", (20 + number, 30)))}}
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": text}]}]
    body = {"model": "weights", "messages": messages, "max_tokens": 1, "temperature": 0}
    return http.post(CHAT, json=body | changes).status_code


def images_read(http: httpx.Client) -> dict[str, Counter[str]]:
    """Return the numbers of images that each replica looked up and found in its cache."""

    def read() -> dict[str, Counter[str]]:
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                if sample.name in ("vllm:mm_cache_queries_total", "vllm:mm_cache_hits_total"):
                    found[sample.labels["engine"]][sample.name[14:-6]] += int(sample.value)
        return dict(found) if len(found) == 2 else {}

    found: dict[str, Counter[str]] = until(read)
    return found


def test_every_image_is_read_by_one_of_two_replicas(http: httpx.Client) -> None:
    before = images_read(http)
    for text in ("what is it?", "is it red?", "and now?"):
        for number in range(40):
            assert ask(http, number, text) == 200
    after = images_read(http)
    queries, hits = (
        {name: counts[key] - before[name][key] for name, counts in after.items()}
        for key in ("queries", "hits")
    )
    assert sum(queries.values()) == 120 and min(queries.values()) > 0
    # each image missed once: the other replica never saw it
    assert sum(hits.values()) == 80, (queries, hits)


def test_a_busy_replica_passes_requests_on(http: httpx.Client) -> None:
    before = images_read(http)

    def passed_on() -> bool:
        """Ask 14 times at once about one image; a slow client may not keep a replica busy."""
        with ThreadPoolExecutor(14) as pool:
            statuses = list(pool.map(lambda n: ask(http, 100, f"{n}", **ENDLESS), range(14)))
        assert statuses == [200] * 14
        after = images_read(http)
        return (
            min(counts["queries"] - before[name]["queries"] for name, counts in after.items()) > 0
        )

    until(passed_on)


def replicas() -> list[psutil.Process]:
    """Return the processes of the model's replicas."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica:c:champion" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_one_of_two_replicas_killed_under_load_fails_no_answer(http: httpx.Client) -> None:
    before, long = {process.pid for process in replicas()}, ENDLESS | {"max_tokens": 40}
    assert len(before) == 2
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, http, 200 + n % 20, f"{n}", **long) for n in range(120)]
        until(lambda: sum(one.done() for one in asked) >= 10)
        os.kill(min(before), signal.SIGKILL)
        assert not all(one.done() for one in asked)
        statuses = Counter(one.result() for one in asked)
    assert statuses == {200: 120}
    until(lambda: len({process.pid for process in replicas()} - before) == 1)  # it is replaced
    assert ask(http, 300) == 200
