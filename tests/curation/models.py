"""What the curations of these tests ask: a CLIP that learned flags, a model that writes, a scripted endpoint."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bridgework import artifacts
from bridgework.config import override
from bridgework.curation.runner import Annotation, Curation, Decision
from bridgework.data.samples import Sample
from bridgework.system import Stage, System, load
from tests.curation.support import flags, written
from tests.inference import tiny
from tests.training.support import go

CLIP_STEPS = 120  # until it tells flags apart


def clip(home: Path) -> str:
    """The artifact of a CLIP that has learned which flag is "red blue"; trained once a session."""
    place = home / "flags-for-clip"
    if not place.exists():
        written(place, list(flags()))
    learning: Stage = replace(load("clip").stages[0].tiny(), evals=())
    source = replace(learning.data.sources[0], name="pairs", dataset=str(place))
    stage = replace(learning, data=replace(learning.data, sources=(source,)))
    fast = {
        "budget.steps": CLIP_STEPS,
        "budget.batch": 16,
        "budget.micro": 16,
        "optim.peak_lr": 2e-3,
    }
    system = System(name="clip", paper="-", stages=(override(stage, fast),))
    return str(go(system, home, "clip-for-curation", stages=None)[stage.name].artifact)


def writer(home: Path) -> str:
    """The artifact of a model of random weights that writes bytes about images, the same ones for the same seed."""
    folder = home / "writer-for-curation"
    if not folder.exists():
        made = tiny.pipeline(template="plain")
        system = System(name="tiny", paper="-", stages=(made.stage,))
        artifacts.save(folder, made.model.state_dict(), system=system, stage=made.stage.name)
    return str(folder)


def judged(curation: Curation, samples: Sequence[Sample], home: Path) -> list[Annotation]:
    """The facts of one row group, through JSON as in a file."""
    facts: list[Annotation] = json.loads(json.dumps(curation.judge(home)(samples), allow_nan=False))
    return facts


def decided(
    curation: Curation, samples: Sequence[Sample], facts: Sequence[Annotation]
) -> list[Decision]:
    """A verdict for every row that is not bad."""
    rows = [
        (sample, fact) for sample, fact in zip(samples, facts, strict=True) if "bad" not in fact
    ]
    return list(curation.decide(lambda: iter(rows)))


@dataclass
class Scripted:
    """An endpoint in this process; `answer` gives a text, a whole body, or the status that a request fails with."""

    answer: Callable[[dict[str, Any]], str | bytes | int]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at_once: int = 0  # requests that were answered side by side, at most
    under_way: int = 0


def completion(content: Any) -> bytes:
    """The body of an answer that says this."""
    message = {"role": "assistant", "content": content}
    return json.dumps(
        {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    ).encode()


@contextmanager
def endpoint(answer: Callable[[dict[str, Any]], str | bytes | int]) -> Iterator[Scripted]:
    """A server that speaks the chat-completions form."""
    told, lock = Scripted(answer), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                told.under_way += 1
                told.at_once = max(told.at_once, told.under_way)
                told.asked.append(request)
                told.keys.append(self.headers["Authorization"])
            given = told.answer(request) if self.path == "/v1/chat/completions" else 404
            with lock:
                told.under_way -= 1
            self._send(given)

        def _send(self, given: str | bytes | int) -> None:
            refused = json.dumps({"error": {"message": "no"}}).encode()
            body = (
                given
                if isinstance(given, bytes)
                else completion(given)
                if isinstance(given, str)
                else refused
            )
            self.send_response(given if isinstance(given, int) else 200)
            self.send_header(
                "Content-Type", "text/html" if body.startswith(b"<") else "application/json"
            )
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
