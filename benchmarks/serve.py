"""Serving under load, next to two other servers: `python -m benchmarks.serve`, about ten minutes.

The same weights (a ViT and an MLP bridge of random weights before a language model of SmolLM2's
shape) are served by bridgework, by `transformers serve` on their export, and by FastAPI with one
`generate` a request. The servers run at once, and the load alternates between them, so that other
work on the machine meets all of them. Only ratios of one run compare.

    python -m benchmarks.serve --clients 1 4 16     requests/s, tokens/s, TTFT, TPOT, E2E, errors
    python -m benchmarks.serve known                TTFT of a second question about an image
    python -m benchmarks.serve kill                 one of two replicas is killed under load
    python -m benchmarks.serve soak --minutes 30    memory under mixed load, failed requests

TTFT is the time to the first token, TPOT that of each further one, E2E that of the complete answer.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bridgework import artifacts
from bridgework.hf.convert import export_hf
from bridgework.models import MLPConfig, PrefixVLMConfig, ViTConfig
from bridgework.serving.launch import free_port
from bridgework.system import System, load

IMAGES = 8
SIDE = 336  # pixels of an image that a client sends
READY_S = 300.0  # time for a server to start
TIMEOUT_S = 300.0  # for one answer
WIDTH = 180  # of tables that are not printed to a terminal
QUESTIONS = ("What is in the picture?", "Which colors do you see?", "Is there a person?",
             "What is on the left side of the picture, and what is on the right?")  # fmt: skip

console = Console()
if not console.is_terminal:
    console.width = WIDTH


@dataclass(frozen=True)
class Server:
    """A running server, as a client addresses it."""

    name: str
    url: str
    model: str
    process: psutil.Process
    streams: bool = True


@dataclass
class Measured:
    """Requests of one round; seconds."""

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wall_s: float = 0.0

    def row(self) -> dict[str, Any]:
        """Return the figures: rates, and percentiles in milliseconds."""
        percentiles = {
            f"{name}_p{p}": 1000 * float(np.percentile(values, p)) if values else None
            for name, values in (("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e))
            for p in (50, 90, 99)
        }
        rates = {
            "tokens_per_s": self.tokens / self.wall_s,
            "requests_per_s": len(self.e2e) / self.wall_s,
        }
        return rates | percentiles | {"errors": dict(self.errors)}


# --- the servers


def write_weights(folder: Path, depth: int) -> None:
    """Write an artifact of a LLaVA whose language model has `depth` of SmolLM2's 30 layers."""
    quick = load("llava:quickstart")["instruct"]
    assert isinstance(quick.model, PrefixVLMConfig)
    language = quick.model.language
    pretrained = depth == language.depth
    if not pretrained:
        language = replace(language, depth=depth, weights=None)
    vision = ViTConfig(image_size=224, patch=16, width=384, depth=6, heads=6, ffn=1536, layer=-2)
    model = PrefixVLMConfig(vision=vision, bridge=MLPConfig(), language=language)
    stage = replace(quick, model=model, starts_from=None, trains={"bridge.*": 1.0}, evals=(),
                    losses=quick.losses[:1],
                    data=replace(quick.data, template="chat", max_tokens=512))  # fmt: skip
    system = System(name="llava", paper="arXiv:2304.08485", stages=(stage,))
    torch.manual_seed(0)
    state = dict(stage.model.build(pretrained=pretrained).named_parameters())  # tied ones once
    artifacts.save(folder, state, system=system, stage=stage.name)


def serve_naive(export: str, port: int) -> None:
    """Serve an export by FastAPI with one `generate` for each request, in FastAPI's threads."""
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    processor = AutoImageProcessor.from_pretrained(export)
    model: Any = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()
    places = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        ids: list[int] = []
        images = []
        for part in body["messages"][0]["content"]:
            if part["type"] == "text":
                ids += tokenizer(part["text"], add_special_tokens=False).input_ids
                continue
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            images.append(Image.open(io.BytesIO(data)).convert("RGB"))
            ids += [model.config.image_token_index] * places
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        most = body["max_tokens"]
        with torch.inference_mode():
            new = model.generate(**inputs, pixel_values=pixels, max_new_tokens=most,
                                 min_new_tokens=most, do_sample=False)  # fmt: skip
        text = tokenizer.decode(new[0, len(ids) :])
        usage = {"prompt_tokens": len(ids), "completion_tokens": new.shape[1] - len(ids)}
        return {"choices": [{"message": {"content": text}}], "usage": usage}

    uvicorn.run(app, port=port, log_level="warning")


def commands(weights: Path, export: Path, replicas: int) -> Mapping[str, tuple[list[str], str]]:
    """Return the command of each server without its port, and the name of its model."""
    python, scripts = sys.executable, Path(sys.executable).parent
    # a replica computes with as many threads as it has CPUs; the others use all cores
    cpus = max(1, (os.cpu_count() or 1) // replicas)
    own = [str(scripts / "bridgework"), "serve", "chat", f"model={weights}", "dev=true",
           f"replicas={replicas}", f"cpus={cpus}", "queued=512"]  # fmt: skip
    return {
        "bridgework": (own, weights.name),
        "naive": ([python, "-m", "benchmarks.serve", "naive", str(export)], "export"),
        "transformers": (
            [str(scripts / "transformers"), "serve", str(export), "--dtype", "float32"],
            str(export),
        ),
    }


@contextmanager
def running(name: str, command: Sequence[str], model: str, log: Path) -> Iterator[Server]:
    """Start a server, wait until it answers, and end it with its children."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline, reported = time.monotonic() + READY_S, time.monotonic()
        while True:
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start:\n{log.read_text()[-2000:]}")
            if time.monotonic() > reported + 10:
                reported = time.monotonic()
                console.print(f"waiting for {name}")
            time.sleep(0.2)
        yield Server(name, url, model, psutil.Process(process.pid), name != "naive")
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in psutil.wait_procs(children, timeout=10)[1]:
            child.kill()


# --- the client


def images(number: int, seed: int = 0, side: int = SIDE) -> list[str]:
    """Return data: URLs of JPEGs of side x side pixels."""
    draws = random.Random(seed)
    urls = []
    for _ in range(number):
        small = Image.frombytes("RGB", (12, 12), draws.randbytes(432))
        file = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG")
        urls.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def body(server: Server, url: str, question: str, tokens: int) -> dict[str, Any]:
    """Return a greedy request about one image."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {
        "model": server.model,
        "max_tokens": tokens,
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
    }


async def ask(http: httpx.AsyncClient, server: Server, request: dict[str, Any],
              measured: Measured) -> None:  # fmt: skip
    """Send one request and add its times; a failure is counted by its kind."""
    route, started = f"{server.url}/v1/chat/completions", time.perf_counter()
    headers = {"authorization": "Bearer local"}
    first, tokens, usage = None, 0, None
    try:
        if not server.streams:
            reply = await http.post(route, json=request, headers=headers)
            reply.raise_for_status()
            usage = reply.json()["usage"]
        else:
            request = request | {"stream": True, "stream_options": {"include_usage": True}}
            async with http.stream("POST", route, json=request, headers=headers) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(event["error"]["code"])
                    usage = event.get("usage") or usage
                    if event["choices"] and event["choices"][0]["delta"].get("content"):
                        first = first or time.perf_counter()
                        tokens += 1
    except (httpx.HTTPError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        measured.errors[str(status or error or type(error).__name__)] += 1
        return
    ended = time.perf_counter()
    tokens = usage["completion_tokens"] if usage else tokens
    measured.e2e.append(ended - started)
    measured.tokens += tokens
    if first is not None:
        measured.ttft.append(first - started)
        if tokens > 1:
            measured.tpot.append((ended - first) / (tokens - 1))


async def load_server(server: Server, clients: int, requests: int, tokens: int,
                      seed: int) -> Measured:  # fmt: skip
    """Send requests from `clients` clients, each waiting for its answer before the next."""
    urls, measured, numbers = images(IMAGES, seed), Measured(), iter(range(requests))
    limits = httpx.Limits(max_connections=clients)

    async def client(http: httpx.AsyncClient) -> None:
        for number in numbers:
            question = QUESTIONS[number % len(QUESTIONS)]
            request = body(server, urls[number % IMAGES], question, tokens)
            await ask(http, server, request, measured)

    started = time.perf_counter()
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    measured.wall_s = time.perf_counter() - started
    return measured


# --- the measurements


def compare(servers: Sequence[Server], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all servers in turn at each number of clients."""
    rows = []
    for server in servers:
        asyncio.run(load_server(server, 2, 2, 4, seed=99))  # warm
    for clients in arguments.clients:
        for repeat in range(arguments.repeats):
            order = list(servers)
            random.Random(repeat).shuffle(order)
            for server in order:
                requests = max(clients, arguments.requests)
                seed = 1_000 * clients + repeat
                measured = asyncio.run(
                    load_server(server, clients, requests, arguments.tokens, seed)
                )
                row = {"server": server.name, "clients": clients, "repeat": repeat}
                rows.append(row | measured.row())
                console.print(json.dumps(rows[-1]), soft_wrap=True)
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the medians over repeats, and the ratios of tokens/s to bridgework's."""
    table = Table("clients", "server", "tokens/s", "requests/s", "TTFT p50/p90/p99 ms",
                  "TPOT p50/p90/p99 ms", "E2E p50/p90/p99 ms", "errors", "ours / it")  # fmt: skip
    for clients in sorted({row["clients"] for row in rows}):
        at = [row for row in rows if row["clients"] == clients]
        own = {r["repeat"]: r["tokens_per_s"] for r in at if r["server"] == "bridgework"}
        for name in dict.fromkeys(row["server"] for row in at):
            of_one = [row for row in at if row["server"] == name]

            def median(key: str, rows: Sequence[Mapping[str, Any]] = of_one) -> float | None:
                values = [row[key] for row in rows if row[key] is not None]
                return statistics.median(values) if values else None

            def three(key: str, median: Any = median) -> str:
                values = [median(f"{key}_p{p}") for p in (50, 90, 99)]
                return " / ".join("-" if v is None else f"{v:.0f}" for v in values)

            ratios = [own[r["repeat"]] / r["tokens_per_s"] for r in of_one if r["repeat"] in own]
            table.add_row(
                str(clients), name, f"{median('tokens_per_s'):.1f}",
                f"{median('requests_per_s'):.2f}", three("ttft"), three("tpot"), three("e2e"),
                str(sum(sum(r["errors"].values()) for r in of_one)),
                ", ".join(f"{ratio:.2f}" for ratio in ratios),
            )  # fmt: skip
    console.print(table)


async def known_image(server: Server, number: int) -> dict[str, Any]:
    """Measure TTFT of the first and second question about each of `number` images."""
    first, second = Measured(), Measured()
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as http:
        for url in images(number, seed=5):
            await ask(http, server, body(server, url, QUESTIONS[0], 2), first)
            await ask(http, server, body(server, url, QUESTIONS[1], 2), second)
    ratios = [b / a for a, b in zip(first.ttft, second.ttft, strict=True)]
    return {
        "first_ttft_ms": 1000 * statistics.median(first.ttft),
        "second_ttft_ms": 1000 * statistics.median(second.ttft),
        "ratio_median": statistics.median(ratios),
    }


def processes(server: Server, deployment: str) -> list[psutil.Process]:
    """Return the processes of a deployment: `champion` has the model, `chat` is the gateway."""
    found = []
    for process in server.process.children(recursive=True):
        try:
            if f"ServeReplica:chat:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


async def kill_replica(server: Server, clients: int, requests: int) -> dict[str, Any]:
    """Kill a replica while non-streaming requests run. Returns counts of answers and errors."""
    plain = replace(server, streams=False)
    load_task = asyncio.ensure_future(load_server(plain, clients, requests, 16, seed=3))
    await asyncio.sleep(3)
    victim = processes(server, "champion")[0]
    victim.kill()
    measured = await load_task
    return {"answers": len(measured.e2e), "errors": dict(measured.errors)}


# --- the soak: mixed load for a long time

# Small caches are full within the first minutes; what grows after that is not a cache.
SMALL_CACHES = ("engine.image_bytes=16777216", "engine.prefix_bytes=67108864")
SIDES = (48, 224, SIDE, 640, 1280)  # pixels of new images
SAMPLE_S = 5.0  # between two looks at the memory
LEFT_S = 20.0  # in which the replica must end what no client waits for


@dataclass(frozen=True)
class Kind:
    """A kind of request of the soak: changes of a plain request, and the status of its answer."""

    share: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    image: str = "known"  # or new, none
    leaves: bool = False  # the client disconnects before the answer is complete
    status: int = 200


BROKEN = "data:image/png;base64,AAAA"
SOAK: Mapping[str, Kind] = {
    "stream, known image": Kind(20, {"stream": True}),
    "stream, new image": Kind(15, {"stream": True}, image="new"),
    "known image": Kind(15),
    "new image": Kind(10, image="new"),
    "text only": Kind(10, image="none"),
    "stream, text only": Kind(5, {"stream": True}, image="none"),
    "three answers": Kind(4, {"n": 3, "temperature": 1.0, "seed": 1, "stop": ["the", "e e"]}),
    "logprobs": Kind(3, {"logprobs": True, "top_logprobs": 5}),
    "json": Kind(3, {"response_format": {"type": "json_object"}}),
    "choice": Kind(3, {"structured_outputs": {"choice": ["a cat", "a dog", "nothing"]}}),
    "stream, left": Kind(5, {"stream": True, "max_tokens": 200}, image="new", leaves=True),
    "left": Kind(5, {"max_tokens": 200}, leaves=True),
    "unknown field": Kind(2, {"tolls": 1}, status=400),
    "unknown model": Kind(1, {"model": "tinny"}, status=404),
    "broken image": Kind(2, {"image": BROKEN}, status=400),
    "too long": Kind(2, {"text": "word " * 12_000}, status=400),
}


@dataclass
class Soak:
    """Counts and memory of a soak."""

    draws: random.Random
    sent: Counter[str] = field(default_factory=Counter)  # by kind
    failed: Counter[str] = field(default_factory=Counter)  # by kind and reason
    memory: list[tuple[float, float, float]] = field(default_factory=list)
    # minutes, MiB of the replica, MiB of the gateway

    def request(self, server: Server, kind: Kind, known: Sequence[str]) -> dict[str, Any]:
        changes, url = dict(kind.changes), self.draws.choice(known)
        if kind.image == "new":
            (url,) = images(1, self.draws.getrandbits(48), self.draws.choice(SIDES))
        question = changes.pop("text", self.draws.choice(QUESTIONS))
        url = changes.pop("image", url)
        request = body(server, url, question, self.draws.randrange(1, 64))
        if kind.image == "none":
            request["messages"][0]["content"] = question
        return request | changes

    def growth(self, column: int, minutes: float) -> float:
        """Return the growth of a process after minute 5, or a sixth of a short soak, in percent."""
        warm, span = min(5.0, minutes / 6), min(1.0, minutes / 10)
        end = self.memory[-1][0]
        first = [row[column] for row in self.memory if warm <= row[0] <= warm + span]
        last = [row[column] for row in self.memory if row[0] >= end - span]
        return 100 * (statistics.median(last) / statistics.median(first) - 1)


async def send(http: httpx.AsyncClient, kind: Kind, request: Mapping[str, Any]) -> str:
    """Send one request; return why it failed, "" if it had the expected answer."""
    route = "/v1/chat/completions"
    try:
        if kind.leaves and not request.get("stream"):
            try:
                async with asyncio.timeout(0.3):
                    await http.post(route, json=request)
            except TimeoutError:
                pass
            return ""
        async with http.stream("POST", route, json=request) as reply:
            if reply.status_code != kind.status:
                await reply.aread()
                return f"{reply.status_code} {reply.text[:200]}"
            last = ""
            async for line in reply.aiter_lines():
                if kind.leaves and '"content"' in line:
                    return ""
                last = line or last
        complete = not request.get("stream") or last == "data: [DONE]"
        return "" if complete else f"the stream ended with {last[:200]}"
    except httpx.HTTPError as error:
        return type(error).__name__


async def soak(server: Server, minutes: float, clients: int) -> dict[str, Any]:
    """Run mixed load; print and return the memory of replica and gateway, and failed requests."""
    (replica,), (gateway,) = processes(server, "champion"), processes(server, "chat")
    known, result, started = images(IMAGES), Soak(random.Random(0)), time.monotonic()
    ends = started + 60 * minutes

    async def client(http: httpx.AsyncClient) -> None:
        names, shares = list(SOAK), [kind.share for kind in SOAK.values()]
        while time.monotonic() < ends:
            (name,) = result.draws.choices(names, shares)
            request = result.request(server, SOAK[name], known)
            result.sent[name] += 1
            if reason := await send(http, SOAK[name], request):
                result.failed[f"{name}: {reason}"] += 1

    async def watch() -> None:
        printed = 0.0
        while True:
            minute = (time.monotonic() - started) / 60
            sizes = [process.memory_info().rss / 2**20 for process in (replica, gateway)]
            result.memory.append((minute, *sizes))
            if not printed or minute >= printed + max(0.25, minutes / 30):
                printed = minute or 1e-9
                console.print(
                    f"minute {minute:5.2f}  replica {sizes[0]:.0f} MiB  "
                    f"gateway {sizes[1]:.0f} MiB  {result.sent.total()} requests, {result.failed.total()} failed"
                )
            await asyncio.sleep(SAMPLE_S)

    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, trust_env=False) as http:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client(http) for _ in range(clients)))
        watching.cancel()
        left = await still_running(http)
    return {
        "minutes": minutes,
        "requests": dict(result.sent),
        "failed": dict(result.failed),
        "running_at_the_end": left,
        "replica_growth_percent": result.growth(1, minutes),
        "gateway_growth_percent": result.growth(2, minutes),
    }


async def still_running(http: httpx.AsyncClient) -> int:
    """Return the requests that the replica still runs LEFT_S seconds after the last client left."""
    deadline = time.monotonic() + LEFT_S
    while True:
        text = (await http.get("/metrics")).text
        rows = [row for row in text.splitlines() if row.startswith("vllm:num_requests_")]
        left = sum(int(float(row.rpartition(" ")[2])) for row in rows)
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("compare", "known", "kill", "soak", "naive")
    parser.add_argument("what", nargs="?", default="compare", choices=names)
    parser.add_argument("export", nargs="?", help="of `naive`: the folder that it serves")
    parser.add_argument("--port", type=int, default=8310, help="of `naive`")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=16, help="of a round, at least")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=int, default=8, help="layers; 30 is SmolLM2-135M itself")
    parser.add_argument("--minutes", type=float, default=30.0, help="of `soak`")
    parser.add_argument("--servers", nargs="+", default=["bridgework", "naive", "transformers"])
    parser.add_argument("--out", type=Path, help="JSON lines of all rounds")
    arguments = parser.parse_args()
    if arguments.what == "naive":
        serve_naive(str(arguments.export), arguments.port)
        return
    with tempfile.TemporaryDirectory() as folder:
        weights, export = Path(folder) / "weights", Path(folder) / "export"
        write_weights(weights, arguments.depth)
        if arguments.what == "compare":
            export_hf(weights, export)
            known = commands(weights, export, replicas=1)
            _compare(known, arguments, Path(folder))
            return
        replicas = 2 if arguments.what == "kill" else 1
        command, model = commands(weights, export, replicas)["bridgework"]
        if arguments.what == "soak":
            command += SMALL_CACHES
        log = Path(folder) / "bridgework.log"
        with running("bridgework", command, model, log) as server:
            asyncio.run(load_server(server, 2, 2, 4, seed=99))  # warm
            work: Callable[[], Coroutine[None, None, dict[str, Any]]] = {
                "known": lambda: known_image(server, 12),
                "kill": lambda: kill_replica(server, 8, 64),
                "soak": lambda: soak(server, arguments.minutes, 8),
            }[arguments.what]
            result = asyncio.run(work())
        print(json.dumps(result))


def _compare(known: Mapping[str, tuple[list[str], str]], arguments: argparse.Namespace,
             folder: Path) -> None:  # fmt: skip
    from contextlib import ExitStack

    with ExitStack() as stack:
        servers = [
            stack.enter_context(running(name, *known[name], folder / f"{name}.log"))
            for name in arguments.servers
        ]
        rows = compare(servers, arguments)
    show(rows)
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
