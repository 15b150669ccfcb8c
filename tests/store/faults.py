"""An S3 server (moto) in a thread, with faults that a test switches on."""

import re
import threading
import time
from collections.abc import Callable, Iterable
from urllib.parse import parse_qs
from wsgiref.types import StartResponse, WSGIEnvironment

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BODY = "<Error><Code>{code}</Code><Message>{message}</Message></Error>"


class FaultyStore:
    """Moto's S3, behind switches.

    delay_s: seconds before every answer. refuse: (HTTP status, S3 code) of every answer. failing:
    number of next answers that are 503. hidden_s: seconds for which new objects are not listed.
    unreachable: requests get no answer.
    """

    def __init__(self, port: int) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", port, self, threaded=True)
        self._written: dict[str, float] = {}
        self.requests: list[tuple[str, str]] = []
        self.reset()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Switch all faults off."""
        self.delay_s = 0.0
        self.refuse: tuple[str, str] | None = None
        self.failing = 0
        self.hidden_s = 0.0
        self.when: Callable[[str, str], bool] = lambda method, path: True

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if self.when(method, path):
            time.sleep(self.delay_s)
            refusal = self.refuse
            if self.failing:
                self.failing -= 1
                refusal = ("503 Service Unavailable", "SlowDown")
            if refusal is not None:
                status, code = refusal
                start(status, [("Content-Type", "application/xml")])
                text = BODY.format(code=code, message=f"message of {code}")
                return [] if method == "HEAD" else [text.encode()]
        if method == "PUT":
            self._written.setdefault(path, time.monotonic())
        answer: Iterable[bytes] = self._app(environ, start)
        listed = "list-type" in parse_qs(environ.get("QUERY_STRING", ""))
        return self._stale(b"".join(answer), path) if self.hidden_s and listed else answer

    def _stale(self, listing: bytes, path: str) -> list[bytes]:
        """Return a listing without the objects that are new."""
        bucket, now = path.strip("/").split("/")[0], time.monotonic()

        def keep(found: re.Match[bytes]) -> bytes:
            key = f"/{bucket}/{found[1].decode()}"
            return b"" if now - self._written.get(key, 0.0) < self.hidden_s else found[0]

        entry = rb"<Contents>.*?<Key>(.*?)</Key>.*?</Contents>"
        shorter = re.sub(entry, keep, listing, flags=re.DOTALL)
        return [shorter + b" " * (len(listing) - len(shorter))]
