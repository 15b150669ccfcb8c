"""`make cluster-test`: the pools of cluster.yaml with Ray's own autoscaler, on one machine.

Starts a head with token authentication and the wheel's autoscaler (v2), whose nodes are processes
of this machine with the resources of cluster.yaml: fake GPUs, on which the tiny system then trains
on the CPU. Everything is submitted as a user does it. Prints a timeline of pools and steps, and
writes it as a picture. Only processes that this program started are ended, by their ids.

python -m tests.cluster_test [--picture FILE]
"""

import argparse
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).parents[1]
POOLS = ("data", "train", "serve")
HEAD = "f" * 51 + "00000"  # FAKE_HEAD_NODE_ID of ray.autoscaler._private.fake_multi_node
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
IDLE_MINUTES = 0.25
LIMIT_S = 600.0  # of any one wait
BIN = Path(sys.executable).parent
GPUS = 4  # of a node of the pool `train`: one worker takes all of them


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def autoscaling(gcs: int) -> dict[str, Any]:
    """cluster.yaml with its pools and resources, and fake nodes for those of the cloud."""
    ours = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = {
        name: {**{k: v for k, v in each.items() if k != "node_config"}, "node_config": {}}
        for name, each in ours["available_node_types"].items()
    }
    types["head"]["max_workers"] = 0
    types["ray.head.default"] = types.pop("head")  # the name that the fake provider expects
    setup = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
    commands = [f"{name}_commands" for name in (*setup, "worker_start_ray")]
    lists = [*commands, "cluster_synced_files", "rsync_exclude", "rsync_filter"]
    return {
        "cluster_name": "cluster-test",
        "max_workers": ours["max_workers"],
        "upscaling_speed": ours["upscaling_speed"],
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external", "module": PROVIDER, "gcs_address": f"127.0.0.1:{gcs}",
            "launch_multiple": True, "head_node_id": HEAD,
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "auth": {"ssh_user": "none"}, "docker": {}, "file_mounts": {},
        "file_mounts_sync_continuously": False, "no_restart": False,
        **{name: [] for name in lists},
    }  # fmt: skip


class Test:
    """The head, the timeline, and what is submitted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.began = folder, time.monotonic()
        self.gcs, self.dashboard = free_port(), free_port()
        self.rows: list[tuple[float, dict[str, int], int]] = []  # seconds, nodes of a pool, step
        self.events: list[tuple[float, str]] = []
        self.jobs: list[subprocess.Popen[str]] = []
        self._over = threading.Event()
        (folder / "token").write_text(secrets.token_hex(16))
        self.env = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "BRIDGEWORK_HOME": str(folder / "home"),
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_prestart_worker_first_driver": "0",  # 48 processes on a node of 48 CPUs
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # of `python` in a job
            "COLUMNS": "300",
        }
        for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
            self.env.pop(name, None)

    def say(self, text: str) -> None:
        at = time.monotonic() - self.began
        self.events.append((at, text))
        print(f"{at:6.1f} s  {text}", flush=True)

    def until(self, true: Callable[[], object], what: str) -> None:
        """Wait; raises TimeoutError, and RuntimeError if a job has failed."""
        end = time.monotonic() + LIMIT_S
        while not true():
            for job in self.jobs:
                if job.poll() not in (None, 0):
                    raise RuntimeError(f"a job failed while waiting for {what}: {job.args}")
            if time.monotonic() > end:
                raise TimeoutError(f"no {what} within {LIMIT_S:g} s")
            time.sleep(0.5)

    @contextmanager
    def head(self) -> Iterator[None]:
        (self.folder / "config.yaml").write_text(json.dumps(autoscaling(self.gcs)))
        command = [
            str(BIN / "ray"), "start", "--head", "--block", f"--port={self.gcs}",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", "--num-cpus=0", f"--temp-dir={self.folder}/r",
            f"--autoscaling-config={self.folder}/config.yaml", "--disable-usage-stats",
        ]  # fmt: skip
        with (self.folder / "head.log").open("w") as log:
            process = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        os.environ.update(self.env)
        import ray

        try:
            self.until(lambda: self._joined(process), "head")
            threading.Thread(target=self._watch, daemon=True).start()
            yield
        finally:
            self._over.set()
            ray.shutdown()
            self._end(process.pid)

    def _joined(self, head: "subprocess.Popen[bytes]") -> bool:
        import ray

        if head.poll() is not None:
            raise RuntimeError((self.folder / "head.log").read_text()[-2_000:])
        try:
            with socket.create_connection(("127.0.0.1", self.dashboard), timeout=1):
                ray.init(
                    address=f"127.0.0.1:{self.gcs}", logging_level="ERROR", log_to_driver=False
                )
        except (OSError, RuntimeError):
            return False
        return True

    def pools(self) -> dict[str, int]:
        """Return the number of nodes of each pool, by their resources."""
        import ray

        count = dict.fromkeys(POOLS, 0)
        for node in ray.nodes():
            have = node["Resources"] if node["Alive"] else {}
            pool = "serve" if "serve" in have else "train" if "GPU" in have else "data"
            if "CPU" in have:
                count[pool] += 1
        return count

    def step(self) -> int:
        """Return the number of steps that the run has in its journal."""
        from tests.training.support import losses

        return max((s + 1 for s, _ in losses(self.folder / "home", "run")), default=0)

    def _watch(self) -> None:
        before = None
        while not self._over.wait(0.5):
            try:
                pools, step = self.pools(), self.step()
            except Exception:  # the head ends
                return
            self.rows.append((time.monotonic() - self.began, pools, step))
            if pools != before:
                before = pools
                self.say("nodes: " + ", ".join(f"{n} {name}" for name, n in pools.items()))

    def submit(self, name: str, *words: str) -> "subprocess.Popen[str]":
        self.say("bridgework " + " ".join(words))
        with (self.folder / f"{name}.log").open("w") as log:
            command = [str(BIN / "bridgework"), "submit", *words]
            job = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, cwd=ROOT, text=True
            )
        self.jobs.append(job)
        return job

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def kill_a_node(self) -> None:
        """End a node of the pool `train` without a notice: its raylet, which this test started."""
        import ray

        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU") == GPUS]
        port = nodes[-1]["NodeManagerPort"]
        for process in self._own():
            if process.name() == "raylet" and port in {
                each.laddr.port for each in process.net_connections() if each.status == "LISTEN"
            }:
                process.kill()
                self.say("a node of the pool train is gone")
                return
        raise RuntimeError(f"no raylet listens on {port}")

    def _own(self) -> list[psutil.Process]:
        """Return the processes that have this test's folder in their command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.folder) in word for word in process.info["cmdline"] or ()):
                found.append(process)
        return found

    def _end(self, head: int) -> None:
        own = [*self._own(), *(p for p in [psutil.Process(head)] if p.is_running())]
        for process in own:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(own, timeout=10)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()


def run(test: Test) -> None:
    from PIL import Image

    photos = test.folder / "photos"
    photos.mkdir()
    for number in range(8):
        Image.new("RGB", (64, 64), (number * 30, 90, 120)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"a field of color {number}")
    with test.head():
        test.say("the head is up, and every pool is at zero")
        test.submit("import", "data", "import", "folder", str(photos), "photos", "workers=1")
        test.until(lambda: test.pools()["data"] >= 1, "node of the pool data")
        train(test)
        test.until(lambda: not test.pools()["train"], "release of the pool train")
        serve(test)
        test.until(lambda: not any(test.pools().values()), "release of all pools")
        test.say("all pools are back at zero")
        test.until(lambda: all(job.poll() == 0 for job in test.jobs), "end of the jobs")


def train(test: Test) -> None:
    """Train on one node, on two, on one after a loss; stop the job, and submit it again."""
    words = [
        "train", "llava", "--tiny", "--stage", "align", "--run", "run", "--workers", "1:2",
        "--gpus-per-worker", str(GPUS), "--resource-timeout", "300", "--set", "stages.*.evals=()",
        "--set", "stages.align.optim.decay=constant", "--set", "stages.align.optim.warmup=0",
    ]  # fmt: skip
    job = test.submit("train", *words, "--set", "stages.align.budget.steps=100000")
    test.until(lambda: test.step() > 0, "step of training")
    test.say("training has begun")
    test.until(lambda: "align: 2 workers instead of 1" in test.log("train"), "second worker")
    test.say(f"two workers train after step {test.step()}")
    more(test, 20)
    test.kill_a_node()
    test.until(lambda: "start again from the newest checkpoint" in test.log("train"), "restart")
    more(test, 20)
    test.say("training continues after the loss of a node")
    test.jobs.remove(job)
    stop = [str(BIN / "ray"), "job", "stop", "run"]
    subprocess.run(stop, env=test.env, check=True, stdout=subprocess.DEVNULL)
    job.wait(LIMIT_S)
    (saved,) = re.findall(r"a checkpoint of step (\d+) is saved", test.log("train"))
    test.say(f"`ray job stop` saved a checkpoint of step {saved}")
    steps = f"stages.align.budget.steps={int(saved) + 20}"
    again = test.submit("again", *words, "--set", steps)
    test.until(lambda: again.poll() is not None, "end of training")
    test.say(f"the run is finished after {test.step()} steps")


def more(test: Test, steps: int) -> None:
    goal = test.step() + steps
    test.until(lambda: test.step() >= goal, f"{steps} steps more")


def serve(test: Test) -> None:
    """Serve the model from the pool for serving: `bridgework serve` joins the Ray with its token."""
    artifact, port = test.folder / "home/runs/run/align/artifact", free_port()
    words = ["serve", "chat", f"model={artifact}", "dev=true", "--port", str(port)]
    test.say("bridgework " + " ".join(["serve", "chat", "model=ARTIFACT", "dev=true"]))
    env = test.env | {"RAY_ADDRESS": f"127.0.0.1:{test.gcs}"}
    with (test.folder / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [str(BIN / "bridgework"), *words], env=env, stdout=log, stderr=log, cwd=ROOT, text=True
        )
    test.jobs.append(server)
    test.until(lambda: test.pools()["serve"], "node of the pool serve")
    test.until(lambda: "answers at" in test.log("serve"), "served model")
    body = {"model": "align", "messages": [{"role": "user", "content": "What is it?"}]}
    url, client = f"http://127.0.0.1:{port}/v1", httpx.Client(trust_env=False, timeout=60)
    body["model"] = client.get(f"{url}/models").json()["data"][0]["id"]
    answer = client.post(f"{url}/chat/completions", json=body | {"max_tokens": 4})
    test.say(f"a served answer: HTTP {answer.status_code}")
    answer.raise_for_status()
    server.terminate()
    server.wait(60)


def picture(rows: Sequence[tuple[float, dict[str, int], int]], file: Path) -> None:
    """Draw the timeline as SVG: nodes of each pool, and the step, over the seconds."""
    width, height, left = 800, 300, 60
    end, most = rows[-1][0], max(1, max(step for _, _, step in rows))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12">'
    ]
    for index, name in enumerate((*POOLS, "step")):
        top = 20 + index * 70
        values = [
            (at, step / most if name == "step" else pools[name] / 3) for at, pools, step in rows
        ]
        dots = " ".join(
            f"{left + at / end * (width - left - 10):.1f},{top + 50 - min(1.0, v) * 45:.1f}"
            for at, v in values
        )
        lines.append(f'<text x="4" y="{top + 50}">{name}</text>')
        lines.append(f'<polyline fill="none" stroke="#36c" stroke-width="2" points="{dots}"/>')
    lines.append(f'<text x="{width - 60}" y="{height - 6}">{end:.0f} s</text></svg>')
    file.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    test = Test(Path(tempfile.mkdtemp(prefix="ct-")))
    run(test)
    if given.picture:
        picture(test.rows, given.picture)


if __name__ == "__main__":
    main()
