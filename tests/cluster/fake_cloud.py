"""The pools of cluster.yaml on one machine: Ray's own autoscaler (v2) with nodes that are processes.

The nodes offer the CPUs and GPUs of cluster.yaml to Ray, whatever the machine has. Everything that
is started here is isolated: its own folder, ports, token and home. It is ended by
process id. Linux only, because a process whose parent ended has to remain a descendant.
"""

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.exceptions import RayError

from bridgework import ray_utils
from bridgework.errors import ResourceError
from tests.cluster.fake_nodes import NODE_ID
from tests.house.source import ROOT

BIN = Path(sys.executable).parent
POOLS = ("data", "train", "serve")
HEAD_ID = "f" * 51 + "00000"  # FAKE_HEAD_NODE_ID of ray.autoscaler._private.fake_multi_node
HEAD_TYPE = "ray.head.default"  # the name of the head that the provider of fake nodes expects
PROVIDER = "tests.cluster.fake_nodes.Provider"
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
END_S = 10.0  # between SIGTERM and SIGKILL


def autoscaling_config(gcs: str, folder: Path, idle_s: float) -> dict[str, Any]:
    """Return cluster.yaml with its node types and limits, for fake nodes.

    gcs: address of the head. folder: of the nodes. idle_s: until an idle node is released.
    """
    ours = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    types = {
        name: {key: value for key, value in given.items() if key != "node_config"}
        | {"node_config": {}}
        for name, given in ours["available_node_types"].items()
    }
    types[HEAD_TYPE] = types.pop(ours["head_node_type"]) | {"max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup")
    starts = ("head_start_ray", "worker_start_ray")
    lists = [f"{name}_commands" for name in (*commands, *starts)]
    return {
        "cluster_name": ours["cluster_name"],
        "max_workers": ours["max_workers"],
        "upscaling_speed": ours["upscaling_speed"],
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": gcs,
            "folder": str(folder),
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
        },
        "available_node_types": types,
        "head_node_type": HEAD_TYPE,
        "auth": {"ssh_user": "none"},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "no_restart": False,
        **{name: [] for name in (*lists, "cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }


def free_ports(count: int) -> list[int]:
    """Return distinct ports of loopback that are not in use."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class FakeCloud:
    """A head with its autoscaler, and the fake nodes that the autoscaler starts."""

    def __init__(self, folder: Path, idle_s: float) -> None:
        """`folder` must have a short path, because Ray's sockets are in it.

        This process must have RAY_AUTH_TOKEN_PATH, `folder`/token, since before its import of Ray.
        """
        if sys.platform != "linux":
            raise SystemExit("the fake cloud needs Linux")
        gcs, dashboard, client, agent, self._metrics, autoscaler = free_ports(6)
        self.folder, self.gcs = folder, f"127.0.0.1:{gcs}"
        self.jobs_address = f"http://127.0.0.1:{dashboard}"
        (folder / "config.json").write_text(
            json.dumps(autoscaling_config(self.gcs, folder, idle_s))
        )
        (folder / "token").write_text(secrets.token_hex(16))
        (folder / "token").chmod(0o600)
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "BRIDGEWORK_", "MLFLOW_"))
        } | {
            "BRIDGEWORK_HOME": str(folder / "home"),
            "PYTHONPATH": str(ROOT),  # of the autoscaler, for its provider
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # of `python` in a job
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_API_SERVER_ADDRESS": self.jobs_address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            NODE_ID: HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": str(autoscaler),
            "DASHBOARD_METRIC_PORT": str(self._metrics),
            "RAY_prestart_worker_first_driver": "0",  # else a process for each of 48 CPUs
            # A lost node is noticed within seconds. A slow answer is not a loss.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_health_check_timeout_ms": "20000",
        }
        self._command = [
            str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=0", f"--port={gcs}",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0",
            f"--temp-dir={folder}/r", f"--autoscaling-config={folder}/config.json",
        ]  # fmt: skip
        self._head: subprocess.Popen[bytes] | None = None
        self._commands: list[Command] = []

    def __enter__(self) -> "FakeCloud":
        ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
        with (self.folder / "head.log").open("w") as log:
            self._head = subprocess.Popen(self._command, env=self.env, stdout=log, stderr=log)
        return self

    def __exit__(self, *error: object) -> None:
        """End this process's descendants, by their ids: all of them were started by the test."""
        while own := psutil.Process().children(recursive=True):
            for process in own:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(own, timeout=END_S)
            for process in alive:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(alive, timeout=END_S)

    def is_ready(self) -> bool:
        """Return True if the head accepts jobs. Raises RuntimeError if it has ended."""
        assert self._head is not None
        if self._head.poll() is not None:
            raise RuntimeError((self.folder / "head.log").read_text()[-2_000:])
        try:
            return ray_utils.jobs(self.jobs_address) == [] and bool(self._nodes())
        except (ResourceError, RayError):
            return False

    def _nodes(self, *, idle: bool = True) -> list[Any]:
        """Return the autoscaler's records of the nodes that run, with or without idle ones."""
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(self.gcs)
        return [*status.active_nodes, *(status.idle_nodes if idle else ())]

    def pools(self) -> dict[str, int]:
        """Return the number of nodes of each pool."""
        count = Counter(node.ray_node_type_name for node in self._nodes())
        return {pool: count[pool] for pool in POOLS}

    def kill_node(self, pool: str) -> None:
        """End the newest busy node of a pool without a notice: its raylet, and so its workers."""
        busy = self._nodes(idle=False)
        newest = max(node.node_id for node in busy if node.ray_node_type_name == pool)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if process.name() == "raylet" and process.environ().get(NODE_ID) == newest:
                    process.kill()
                    return
        raise RuntimeError(f"no raylet of the node {newest}")

    def start(self, name: str, *command: str, **env: str) -> "Command":
        """Start a program of the environment's bin folder, with its output in a file `name`.log."""
        started = Command(name, command, self.folder / f"{name}.log", self.env | env)
        self._commands.append(started)
        return started

    def reap(self) -> None:
        """Reap orphans that ended, as an init process does: `ray job stop` waits for the driver."""
        assert self._head is not None
        own = {self._head.pid, *(command.process.pid for command in self._commands)}
        for process in psutil.Process().children():
            with suppress(psutil.Error, ChildProcessError):
                if process.pid not in own and process.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(process.pid, os.WNOHANG)


class Command:
    """A running command and its output."""

    def __init__(self, name: str, command: tuple[str, ...], log: Path, env: dict[str, str]) -> None:
        self.name, self._log, self._began = name, log, time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]], env=env, stdout=file, stderr=file, cwd=ROOT
            )

    @property
    def output(self) -> str:
        """The output so far."""
        return self._log.read_text()

    def is_done(self) -> bool:
        """Return True after a success. Raises RuntimeError after a failure."""
        code = self.process.poll()
        if code:
            raise RuntimeError(f"{self.name} ended with {code}:\n{self.output[-3_000:]}")
        return code == 0
