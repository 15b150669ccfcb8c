"""Nodes of one machine that share no disk: each is a Ray node with its own HOME, TMPDIR and cache.

Python processes of a node are guarded (see `node_guard`). Where the kernel allows it, a mount
namespace also hides the folders of the others, for code that is not Python. What is started here is
ended by process id.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from bridgework.serving.launch import free_port
from tests.house.source import ROOT

BIN = Path(sys.executable).parent
END_S = 10.0  # between SIGTERM and SIGKILL
WAIT_S = 400.0  # longest wait for an event: the machine may be busy
AGENT_PORTS = (
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "metrics-export-port",
    "runtime-env-agent-port",
)
OWN = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "BRIDGEWORK_CACHE", "MLFLOW_TRACKING_URI", "XDG_CACHE_HOME")


def until(what: str, happened: Callable[[], object], wait_s: float = WAIT_S) -> None:
    """Wait for an event. Raises TimeoutError, and what `happened` raises."""
    deadline = time.monotonic() + wait_s
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {wait_s:g} s: {what}")
        time.sleep(0.3)


@cache
def can_hide(folder: Path) -> bool:
    """Return True if this user may mount in a namespace of its own."""
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


class Command:
    """A running process, with its output in a file."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> None:
        self._words, self._log = words, log
        with log.open("w") as file:
            self.process = subprocess.Popen(words, env=env, cwd=cwd, stdout=file, stderr=file)

    @property
    def output(self) -> str:
        """The output so far."""
        return self._log.read_text()

    @property
    def last_line(self) -> str:
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")

    def wait(self, wait_s: float = WAIT_S) -> int:
        """Wait for the end; returns the exit code. Raises TimeoutError."""
        try:
            return self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{' '.join(self._words)}: {self.output[-3_000:]}") from None

    def runs(self) -> bool:
        """Return True while it runs. Raises RuntimeError after its end."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{' '.join(self._words)} has ended: {self.output[-3_000:]}")
        return True

    def end(self) -> None:
        """End the process and its descendants."""
        with suppress(psutil.Error):
            started = psutil.Process(self.process.pid)
            own = [started, *started.children(recursive=True)]
            self.process.terminate()
            _, alive = psutil.wait_procs(own, timeout=END_S)
            for process in alive:
                with suppress(psutil.Error):
                    process.kill()
        self.process.wait()


class Node:
    """A node: its folder, the environment of its processes, and its Ray."""

    def __init__(self, folder: Path, hidden: Sequence[Path], env: Mapping[str, str]) -> None:
        """hidden: folders that do not exist for it. env: variables of its processes, e.g. a store."""
        self.folder, self._hidden = folder, [path for path in hidden if can_hide(path)]
        for name in ("home", "tmp", "site", "work", "r"):
            (folder / name).mkdir(parents=True)
        shutil.copy(ROOT / "tests/cluster/node_guard.py", folder / "site/sitecustomize.py")
        self.env = {name: value for name, value in os.environ.items() if name not in OWN} | {
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "RAY_TMPDIR": str(folder / "r"),
            "PYTHONPATH": str(folder / "site"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NODE_FOLDER": str(folder),
            "NODE_READS": str(ROOT / "platform"),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_prestart_worker_first_driver": "0",
            # a busy machine is slow, and not lost
            "RAY_raylet_start_wait_time_s": "300",
            "RAY_gcs_server_port_wait_time_s": "300",
            "RAY_health_check_timeout_ms": "60000",
            **env,
        }
        self._commands: list[Command] = []

    def start_ray(self, *, head: str | None, cpus: float, gpus: float) -> str:
        """Start a head, or a node of the head at an address; returns the address of the head.

        The GPUs exist for Ray alone, to choose the node of a worker: the tiny stages then train on
        its CPU.
        """
        address = head or f"127.0.0.1:{free_port()}"
        words = [
            "ray", "start", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus:g}",
            f"--num-gpus={gpus:g}", f"--temp-dir={self.folder}/r", "--min-worker-port=0",
            "--max-worker-port=0", "--object-store-memory=100000000",
            # Ports that the agents choose would be waited for, for 15 s: too short if it is busy.
            *(f"--{name}={free_port()}" for name in AGENT_PORTS),
        ]  # fmt: skip
        if head is None:
            words += ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
            words += [f"--ray-client-server-port={free_port()}"]
        else:
            words += [f"--address={head}"]
        ray = self.start("ray", *words)
        until("a Ray node", lambda: ray.runs() and "Ray runtime started" in ray.output)
        return address

    def start(self, log: str, *words: str, **env: str) -> Command:
        """Start a program of the environment's bin folder, with its output in a file `log`."""
        command = [str(BIN / words[0]), *words[1:]]
        if self._hidden:
            mounts = " && ".join(f"mount -t tmpfs none {path}" for path in self._hidden)
            command = ["unshare", "-Urm", "sh", "-c", f'{mounts} && exec "$@"', "sh", *command]
        # A worker enters the folder of its command where it can. Without a namespace it could, but
        # must not.
        cwd = self.folder / "work" if self._hidden else ROOT / "platform"
        started = Command(command, self.env | env, cwd, self.folder / f"{log}-output.txt")
        self._commands.append(started)
        return started

    def refused(self) -> list[str]:
        """Return the recorded uses of paths outside the folders of the node."""
        file = self.folder / "refused.txt"
        return file.read_text().splitlines() if file.exists() else []

    def guarded(self) -> str:
        """Return the command lines of its guarded processes."""
        return (self.folder / "guarded.txt").read_text()

    def stop(self) -> None:
        """End what was started here, the newest first."""
        for command in reversed(self._commands):
            command.end()


def install_other_version(node: Node, version: str) -> None:
    """Give a node a copy of the package with another version."""
    site, package = node.folder / "site", ROOT / "platform/bridgework"
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, site / "bridgework", ignore=skipped)
    file = site / "bridgework/__init__.py"
    text, count = re.subn(
        r'^__version__ = ".*"$', f'__version__ = "{version}"', file.read_text(), flags=re.MULTILINE
    )
    assert count == 1
    file.write_text(text)
    info = site / f"bridgework-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bridgework\nVersion: {version}\n")
