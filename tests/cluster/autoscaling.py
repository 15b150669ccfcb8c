"""`make cluster-test`: a user's day on a cluster that grows from zero nodes, on one machine.

Imports, trains and serves on the pools of cluster.yaml (see fake_cloud.py), by the commands that
docs/cluster.md names. The tiny system trains on the CPU, on nodes that offer fake GPUs. Prints what
happens and how many nodes every pool has; raises if a step does not happen.

python -m tests.cluster.autoscaling [--picture FILE.png]
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray reads these once, at its import.
FOLDER = Path(tempfile.mkdtemp(prefix="bw-"))
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(FOLDER / "token")}

from PIL import Image  # noqa: E402
from ray.exceptions import RayError  # noqa: E402

from bridgework.data.dataset import open_dataset  # noqa: E402
from bridgework.tracking.tracker import Journal  # noqa: E402
from bridgework.training.checkpoint import checkpoints  # noqa: E402
from tests.cluster.fake_cloud import POOLS, FakeCloud, free_ports  # noqa: E402

IDLE_S = 15.0  # until a node is released; cluster.yaml: five minutes
WAIT_S = 300.0  # longest wait for any event: the machine may be busy
POLL_S = 0.5
RUN, STAGE = "run", "align"
PHOTOS = 8
GPUS = 4  # of a node of the pool `train`; a worker takes all of them, so that two need two nodes
STEPS = 20  # of training after each change of the nodes
NEVER = 100_000  # steps of a stage that is stopped before its end
TRAIN = (
    "train", "llava", "--tiny", "--stage", STAGE, "--run", RUN, "--workers", "1:2",
    "--gpus-per-worker", str(GPUS), "--threads", "1", "--resize-every", "10",
    "--set", f"stages.{STAGE}.evals=()",
    # constant, so that the number of steps may change between two jobs of the run
    "--set", f"stages.{STAGE}.optim.decay=constant", "--set", f"stages.{STAGE}.optim.warmup=0",
)  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """The cluster at one time. at_s: since the start."""

    at_s: float
    pools: dict[str, int]
    step: int | None


class Timeline:
    """Events, and the nodes of every pool and the newest step at all times."""

    def __init__(self, cloud: FakeCloud) -> None:
        self.moments: list[Moment] = []
        self.events: list[tuple[float, str]] = []
        self.steps = 0  # that were taken, repeated ones included
        self._cloud, self._began = cloud, time.monotonic()
        self._journal = Journal(cloud.folder / "home/runs" / RUN / STAGE / "journal")
        self._position, self._step = "", None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def say(self, text: str) -> None:
        """Record and print an event."""
        at_s = time.monotonic() - self._began
        self.events.append((at_s, text))
        print(f"{at_s:6.1f} s  {text}", flush=True)

    def start(self) -> None:
        """Watch the cluster, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the watching thread."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def pools(self) -> dict[str, int]:
        """The newest number of nodes of each pool."""
        return self.moments[-1].pools if self.moments else dict.fromkeys(POOLS, 0)

    def wait(self, what: str, happened: Callable[[], object]) -> None:
        """Wait for something. Raises TimeoutError, and what `happened` raises."""
        deadline = time.monotonic() + WAIT_S
        while not happened():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {WAIT_S:g} s: {what}")
            time.sleep(POLL_S)

    def train_more(self) -> None:
        """Wait until STEPS steps more are taken."""
        goal = self.steps + STEPS
        self.wait(f"{STEPS} steps more", lambda: self.steps >= goal)

    def _watch(self) -> None:
        before: dict[str, int] | None = None
        while not self._over.wait(POLL_S):
            self._cloud.reap()
            with suppress(RayError):  # the head is busy
                pools = self._cloud.pools()
                self._read_journal()
                self.moments.append(Moment(time.monotonic() - self._began, pools, self._step))
                if pools != before:
                    self.say("nodes: " + ", ".join(f"{pool} {n}" for pool, n in pools.items()))
                before = pools

    def _read_journal(self) -> None:
        for position, points in self._journal.points(self._position):
            self._position = position
            steps = [point.step for point in points if point.key == "loss"]
            if steps:
                self.steps, self._step = self.steps + len(steps), steps[-1]


def go(cloud: FakeCloud, timeline: Timeline) -> None:
    """Import, train and serve, and wait until all pools are at zero again."""
    timeline.wait("a head", cloud.is_ready)
    timeline.start()
    timeline.say("the head runs, and no other node")
    photos = cloud.folder / "photos"
    photos.mkdir()
    for number in range(PHOTOS):
        Image.new("RGB", (64, 64), (number * 30, 90, 120)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"color number {number}")
    timeline.say("bridgework submit data import folder PHOTOS photos --workers 1")
    words = ("data", "import", "folder", str(photos), "photos", "--workers", "1")
    data = cloud.start("import", "bridgework", "submit", *words)
    timeline.wait("a node of the pool data", lambda: data.is_done() or timeline.pools["data"])
    train(cloud, timeline, data)
    serve(cloud, timeline)
    timeline.wait("the release of all pools", lambda: not any(timeline.pools.values()))
    timeline.say("no node besides the head is left")


def train(cloud: FakeCloud, timeline: Timeline, data: Any) -> None:
    """Train on one node, on two, on one after a loss; stop the job, and resume the run."""
    words = ("bridgework", "submit", *TRAIN, "--set", f"stages.{STAGE}.budget.steps={NEVER}")
    timeline.say("bridgework submit train llava --tiny --workers 1:2 ..")
    job = cloud.start("train", *words)
    timeline.wait("the import", data.is_done)
    rows = open_dataset(str(cloud.folder / "home/datasets/photos")).manifest.rows
    assert rows == PHOTOS
    timeline.say(f"{rows} pairs are imported")
    timeline.wait("a step of training", lambda: job.is_done() or timeline.steps)
    timeline.say(f"training started, nodes of the pool train: {timeline.pools['train']}")
    grown = "2 workers instead of 1 train from now on"
    timeline.wait("a second worker", lambda: job.is_done() or grown in job.output)
    timeline.say(f"2 workers train, after {timeline.steps} steps")
    timeline.train_more()
    timeline.say("a node of the pool train is killed")
    cloud.kill_node("train")
    again = "the workers start again from the newest checkpoint"
    timeline.wait("a restart", lambda: job.is_done() or again in job.output)
    timeline.train_more()
    timeline.say("training continues after the loss")
    stopped = cloud.start("stop", "ray", "job", "stop", RUN)
    timeline.wait("the end of the job", lambda: job.process.poll() is not None)
    timeline.wait("`ray job stop`", stopped.is_done)
    saved = checkpoints(cloud.folder / "home/runs" / RUN / STAGE)[0].step
    assert f"a checkpoint of step {saved} is saved" in job.output, job.output[-3_000:]
    timeline.say(f"`ray job stop` saved a checkpoint of step {saved}")
    last = saved + STEPS
    job = cloud.start("again", *words[:-1], f"stages.{STAGE}.budget.steps={last}")
    timeline.wait("the end of the stage", job.is_done)
    timeline.say(f"the same command resumed and finished the stage at step {last}")


def serve(cloud: FakeCloud, timeline: Timeline) -> None:
    """Serve the model with `bridgework serve` on the head, which joins the Ray there; ask it."""
    artifact = cloud.folder / "home/runs" / RUN / STAGE / "artifact"
    (port,) = free_ports(1)
    words = ("serve", "chat", f"model={artifact}", "dev=true", "--port", str(port))
    timeline.say("bridgework serve chat model=ARTIFACT dev=true")
    server = cloud.start("serve", "bridgework", *words, RAY_ADDRESS=cloud.gcs)
    timeline.wait("a node of the pool serve", lambda: server.is_done() or timeline.pools["serve"])
    timeline.wait("an endpoint", lambda: server.is_done() or "answers at" in server.output)
    url = f"http://127.0.0.1:{port}/v1"
    # without a question, because the stage was trained on captions
    ask = cloud.start("ask", "python", "-m", "examples.ask", "", "--url", url, "--tokens", "4")
    timeline.wait("an answer", ask.is_done)
    assert re.search(r"^chatcmpl-", ask.output, re.MULTILINE), ask.output
    timeline.say("the served model answered")
    server.process.terminate()
    timeline.wait("the end of the endpoint", server.is_done)
    timeline.say("the endpoint is stopped")


def draw(timeline: Timeline, file: Path) -> None:
    """Draw the nodes of every pool and the step of training over time."""
    from matplotlib import pyplot

    at_s = [moment.at_s for moment in timeline.moments]
    figure, rows = pyplot.subplots(
        len(POOLS) + 1, 1, sharex=True, figsize=(10, 6), height_ratios=(1, 1, 1, 2)
    )
    for axes, pool in zip(rows, POOLS, strict=False):
        nodes = [moment.pools[pool] for moment in timeline.moments]
        axes.fill_between(at_s, nodes, step="post", alpha=0.4)
        most = max(2, *nodes)
        axes.set_ylim(0, most + 0.5)
        axes.set_yticks(range(most + 1))
        axes.set_ylabel(pool, rotation=0, ha="right", va="center")
    steps = [float("nan") if m.step is None else m.step for m in timeline.moments]
    rows[-1].plot(at_s, steps, drawstyle="steps-post")
    rows[-1].set_ylabel("step", rotation=0, ha="right", va="center")
    rows[-1].set_xlabel("seconds")
    shown = [event for event in timeline.events if not event[1].startswith("nodes: ")]
    for number, (time_s, _) in enumerate(shown, 1):
        for axes in rows:
            axes.axvline(time_s, color="gray", linewidth=0.5)
        rows[0].annotate(
            str(number), (time_s, 1.0), xycoords=("data", "axes fraction"), fontsize=7,
            ha="center", va="bottom",
        )  # fmt: skip
    legend = "\n".join(f"{number}  {text}" for number, (_, text) in enumerate(shown, 1))
    figure.text(0.99, 0.5, legend, fontsize=7, va="center")
    figure.savefig(file, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended then too
    with FakeCloud(FOLDER, IDLE_S) as cloud:
        timeline = Timeline(cloud)
        try:
            go(cloud, timeline)
        except BaseException:
            print(f"the logs are in {FOLDER}")
            raise
        finally:
            timeline.stop()
    shutil.rmtree(FOLDER)
    if arguments.picture:
        draw(timeline, arguments.picture)


if __name__ == "__main__":
    main()
