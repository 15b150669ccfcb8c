"""A dataset of 100,000 shards in a store: time and memory to list it and to start a run on it.

    python -m benchmarks.store [--shards N]

The store is a local S3 server that answers every name of a shard with the same bytes, after
--latency seconds. A child process does the work, so that its memory is that of a user's process.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

SHARD = re.compile(r"big/shard-(\d{5})\.parquet")
DATE = "Mon, 30 Nov 2026 00:00:00 GMT"
BUCKET = "store"


class FakeStore(BaseHTTPRequestHandler):
    """Part of S3: objects, listings in pages of 1,000, ranges, copies and deletions."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes] = {}  # noqa: RUF012 - shared by all requests
    shard = b""
    shards = 0
    latency_s = 0.0

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}").strip("/")

    def _content(self, key: str) -> bytes | None:
        found = SHARD.fullmatch(key)
        if found and int(found[1]) < self.shards:
            return self.shard
        return self.objects.get(key)

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        time.sleep(self.latency_s)
        self.send_response(status)
        length = headers.pop("length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        content = self._content(self._key())
        if content is None:
            self._answer(200 if not self._key() else 404)
        else:
            tag = f'"{md5(content).hexdigest()}"'
            self._answer(200, length=str(len(content)), ETag=tag, Last_Modified=DATE)

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._answer(200, self._page(query), Content_Type="application/xml")
            return
        content = self._content(self._key())
        if content is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        tag, part = f'"{md5(content).hexdigest()}"', self.headers.get("Range")
        if part is None:
            self._answer(200, content, ETag=tag, Last_Modified=DATE)
            return
        first, last = part.removeprefix("bytes=").split("-")
        body = content[int(first) : int(last or len(content)) + 1]
        place = f"bytes {first}-{int(first) + len(body) - 1}/{len(content)}"
        self._answer(206, body, ETag=tag, Last_Modified=DATE, Content_Range=place)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        source = self.headers.get("x-amz-copy-source")
        if source is not None:
            body = self._content(unquote(source).partition("/")[2]) or b""
        elif self.headers.get("If-None-Match") and self._content(self._key()) is not None:
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        self.objects[self._key()] = body
        tag = f'"{md5(body).hexdigest()}"'
        copied = f"<CopyObjectResult><ETag>{tag}</ETag></CopyObjectResult>"
        self._answer(200, copied.encode() if source else b"", ETag=tag)

    def do_DELETE(self) -> None:
        self.objects.pop(self._key(), None)
        self._answer(204)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        for key in re.findall("<Key>(.*?)</Key>", body):
            self.objects.pop(key, None)
        self._answer(200, b"<DeleteResult></DeleteResult>", Content_Type="application/xml")

    def _names(self, prefix: str, after: str, most: int) -> Iterator[str]:
        """Yield at least `most` names after `after`, if there are that many."""
        yield from (key for key in self.objects if key.startswith(prefix) and key > after)
        if "big/".startswith(prefix) or prefix.startswith("big/"):
            found = SHARD.fullmatch(after)
            first = int(found[1]) + 1 if found else self.shards if after > "big/shard-~" else 0
            numbers = range(first, min(self.shards, first + most))
            names = (f"big/shard-{number:05d}.parquet" for number in numbers)
            yield from (name for name in names if name.startswith(prefix))

    def _page(self, query: dict[str, list[str]]) -> bytes:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        after = query.get("continuation-token", [""])[0]
        most = int(query.get("max-keys", ["1000"])[0])
        names: dict[str, bool] = {}
        for name in self._names(prefix, after, most + 1):
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            names[prefix + head + delimiter if found else name] = bool(found)
        page = sorted(names)[: most + 1]
        more, page = len(page) > most, page[:most]
        entries = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            if names[name]
            else f"<Contents><Key>{escape(name)}</Key><Size>{len(self._content(name) or b'')}</Size>"
            '<ETag>"0"</ETag><LastModified>2026-11-30T00:00:00.000Z</LastModified></Contents>'
            for name in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        head = f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(page)}</KeyCount>"
        return f"<ListBucketResult>{head}{token}{entries}</ListBucketResult>".encode()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def serve(shards: int, latency_s: float) -> str:
    """Start a store with a dataset of `shards` equal shards; returns its address."""
    from bridgework.data.dataset import read_manifest, write
    from bridgework.data.synthetic import shapes

    rows = list(shapes())[:4]
    with tempfile.TemporaryDirectory() as folder:
        write(
            rows,
            f"{folder}/one",
            source="synthetic:shapes",
            license="CC0-1.0",
            made_by="benchmarks.store",
            group_rows=4,
            shard_rows=4,
        )
        one = read_manifest(f"{folder}/one")
        FakeStore.shard = Path(folder, "one", one.shards[0].file).read_bytes()
    listed = tuple(replace(one.shards[0], file=f"shard-{n:05d}.parquet") for n in range(shards))
    manifest = replace(one, rows=4 * shards, shards=listed)
    FakeStore.objects = {"big/manifest.json": manifest.to_json().encode()}
    FakeStore.shards, FakeStore.latency_s = shards, latency_s
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeStore)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def work() -> tuple[dict[str, tuple[float, float]], float]:
    """List the dataset and train two steps on it.

    Returns (seconds, CPU-seconds) by part, and the peak memory in GB.
    """
    started, cpu = time.perf_counter(), time.process_time()
    from bridgework import storage
    from bridgework.config import override
    from bridgework.system import load
    from bridgework.training.driver import train
    from bridgework.training.options import RunOptions

    times = {"import": (time.perf_counter() - started, time.process_time() - cpu)}
    started, cpu = time.perf_counter(), time.process_time()
    fs, root = storage.find_store(f"s3://{BUCKET}/big")
    assert len(fs.find(root)) > 1
    times["list"] = time.perf_counter() - started, time.process_time() - cpu
    steps: list[tuple[float, float]] = []

    def report(metrics: dict[str, float], step: int) -> None:
        steps.append((time.perf_counter() - started, time.process_time() - cpu))

    system = override(
        load("llava").tiny(),
        {
            "stages.align.data.sources.*.dataset": f"s3://{BUCKET}/big",
            "stages.align.budget.steps": 2,
        },
    )
    started, cpu = time.perf_counter(), time.process_time()
    options = RunOptions(workers=0, evaluate_every=1, report=report, features="computed")
    home = storage.locate(f"s3://{BUCKET}/home")
    train(system, home=home, run="run", options=options, stages=["align"])
    times["start, to the first step"] = steps[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return times, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before every answer")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(work()))
        return
    address = serve(given.shards, given.latency)
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_DEFAULT_REGION": "us-east-1",
            "BRIDGEWORK_CACHE": cache,
        }
        command = [sys.executable, "-m", "benchmarks.store", "--child"]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    times, peak = json.loads(done.stdout.splitlines()[-1])
    for name, (seconds, cpu) in times.items():
        print(f"{name:<26} {seconds:7.2f} s {cpu:7.2f} CPU-s")
    print(f"peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
