"""Serving on a running Ray with token authentication, as in docs/cluster.md and docs/serving.md."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from bridgework.serving.launch import free_port

pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).with_name("ray"))
ALONE = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables of a user with a token."""
    kept = {name: value for name, value in os.environ.items() if name not in ALONE}
    folder = tmp_path_factory.mktemp("user")
    env = kept | {"HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run([RAY, "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    return env


@pytest.fixture(scope="module")
def head(environment: dict[str, str]) -> Iterator[str]:
    """Start `ray start --head` on free ports; yield its address."""
    folder = tempfile.mkdtemp(prefix="bw-head-")  # sockets need a short path
    ports = (
        "port",
        "dashboard-port",
        "ray-client-server-port",
        "dashboard-agent-listen-port",
        "metrics-export-port",
    )
    chosen = {name: free_port() for name in ports}
    words = [f"--{name}={port}" for name, port in chosen.items()]
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder}", *words]
    log = Path(folder, "head.log")
    with (
        log.open("w") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            until(lambda: "Ray runtime started" in log.read_text(), process)
            yield f"127.0.0.1:{chosen['port']}"
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


def until(condition: object, process: subprocess.Popen[Any]) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


def command(weights: str, port: int) -> list[str]:
    words = ["serve", "chat", f"model={weights}", "dev=true", "cpus=0.5", "--port", str(port)]
    return [sys.executable, "-m", "bridgework.cli", *words]


def healthy(port: int) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    return False


def test_serve_joins_a_ray_with_token_and_leaves_it_running(
    head: str, environment: dict[str, str], weights: str
) -> None:
    port, env = free_port(), environment | {"RAY_ADDRESS": head}
    for _ in range(2):  # again after the first one ended: the Ray is still there
        words = command(weights, port)
        with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert any("answers at" in line for line in process.stdout)  # it answers before that
            assert healthy(port)
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0


@pytest.mark.parametrize("name", ["serve", "train", "doctor", "traffic"])
@pytest.mark.parametrize("change", ["no token", "another token", "no Ray"])
def test_failed_join_of_ray_is_a_one_line_error(
    head: str, environment: dict[str, str], weights: str, change: str, name: str
) -> None:
    env = environment | {"RAY_ADDRESS": head}
    if change == "no token":
        env["RAY_AUTH_MODE"] = "disabled"
    elif change == "another token":
        env["RAY_AUTH_TOKEN"] = "0" * 64
    else:
        env["RAY_ADDRESS"] = f"127.0.0.1:{free_port()}"
    words = {
        "serve": command(weights, free_port()),
        "train": [sys.executable, "-m", "bridgework.cli", "train", "llava", "--tiny"],
        "doctor": [sys.executable, "-m", "bridgework.cli", "doctor", "--cluster"],
        "traffic": [sys.executable, "-m", "bridgework.cli", "traffic", "chat"],
    }
    said = subprocess.run(words[name], env=env, capture_output=True, text=True, timeout=200)
    assert said.returncode == 1
    line = said.stderr.splitlines()[-1]
    assert re.match(rf"error  {env['RAY_ADDRESS']}: the cluster cannot be joined\..* Fix: ", line)
    assert ("RAY_AUTH_MODE=token" in line) == ("token" in change), line
    assert "Traceback" not in said.stderr, said.stderr
