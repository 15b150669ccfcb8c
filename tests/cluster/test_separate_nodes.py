"""Nodes that share a store, a tracking server and Ray, and no disk; and nodes that do not fit."""

import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest

from bridgework import __version__, artifacts, storage
from bridgework.config import override
from bridgework.evaluation import results
from bridgework.serving.launch import free_port
from bridgework.system import System, load
from bridgework.tracking.mlflow_store import MLflowReader
from bridgework.training import checkpoint
from tests.cluster.separate_nodes import Command, Node, install_other_version, until
from tests.store.faults import FaultyStore
from tests.training.support import go, losses, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUN, STAGE = "nodes", "align"
NEVER = 100_000  # steps of a stage that is stopped before its end
MORE = 10  # steps after the resume
OFF_S = 600  # by which the clock of the second node is ahead
# constant, so that the number of steps may change between two commands of the run
CONSTANT = {f"stages.{STAGE}.optim.decay": "constant", f"stages.{STAGE}.optim.warmup": 0.0}
ANONYMOUS = {
    "AWS_ACCESS_KEY_ID": "",
    "AWS_SECRET_ACCESS_KEY": "",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": "/etc/none",
    "AWS_CONFIG_FILE": "/etc/none",
}


class Cluster(NamedTuple):
    """Two nodes with separate folders, whose home is in a store; and their tracking server."""

    head: Node
    other: Node
    address: str
    home: Path
    tracking: str

    def start(self, node: Node, log: str, *words: str) -> Command:
        """Start `bridgework WORDS` on a node; its output is in the node's file of that name."""
        env = {"RAY_ADDRESS": self.address, "COLUMNS": "400"}
        return node.start(log, "python", "-m", "bridgework.cli", *words, **env)

    def train(self, log: str, run: str, steps: int, workers: int, gpus: float) -> Command:
        """Start the training of the tiny LLaVA's first stage, from the head."""
        words = (
            "train", "llava", "--tiny", "--stage", STAGE, "--run", run, "--workers", str(workers),
            "--gpus-per-worker", f"{gpus:g}", "--threads", "1",
        )  # fmt: skip
        changes = CONSTANT | {f"stages.{STAGE}.budget.steps": steps}
        set_ = [word for path, value in changes.items() for word in ("--set", f"{path}={value}")]
        return self.start(self.head, log, *words, *set_)


def system(steps: int) -> System:
    return override(load("llava").tiny(), CONSTANT | {f"stages.{STAGE}.budget.steps": steps})


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A folder with a short path, because Ray's sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="bw-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(server: FaultyStore, root: Path) -> Iterator[Cluster]:
    bucket, port = f"nodes-{uuid4().hex[:6]}", free_port()
    storage.find_store("s3://")[0].fs.mkdir(bucket)
    home, uri, folder = (
        storage.locate(f"s3://{bucket}/home"),
        f"http://127.0.0.1:{port}",
        root / "t",
    )
    for name in ("a", "b", "t"):
        (root / name).mkdir()
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "TMPDIR": str(folder)}
    tracking = Command(
        [
            sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1",
            "--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination", str(folder / "artifacts"),
        ],
        env, folder, folder / "server.txt",
    )  # fmt: skip
    shared = {"BRIDGEWORK_HOME": str(home), "MLFLOW_TRACKING_URI": uri}
    head = Node(root / "a", [root / "b", folder], shared)
    other = Node(root / "b", [root / "a", folder], shared | {"NODE_CLOCK_S": str(OFF_S)})
    try:
        address = head.start_ray(head=None, cpus=2, gpus=1)
        other.start_ray(head=address, cpus=2, gpus=1)
        until(
            "the tracking server", lambda: tracking.runs() and "startup complete" in tracking.output
        )
        yield Cluster(head, other, address, home, uri)
    finally:
        for one in (other, head):
            one.stop()
        tracking.end()


def test_nodes_share_a_store_and_no_disk(cluster: Cluster, home: Path) -> None:
    """Two nodes train, stop, resume and evaluate; the clock of one is ten minutes ahead."""
    first = cluster.train("first", RUN, NEVER, workers=2, gpus=1)
    until("ten steps", lambda: first.runs() and len(losses(cluster.home, RUN)) >= 10)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 130, first.output
    folder = cluster.home / "runs" / RUN / STAGE
    (saved,) = checkpoint.checkpoints(folder)[:1]
    assert f"a checkpoint of step {saved.step} is saved" in first.output
    assert saved.world == 2

    steps = saved.step + MORE
    second = cluster.train("second", RUN, steps, workers=2, gpus=1)
    assert second.wait() == 0, second.output
    assert [step for step, _ in losses(cluster.home, RUN)] == list(range(steps))
    go(system(steps), home, RUN, threads=1)
    local = dict(losses(home, RUN))
    assert all(
        loss == pytest.approx(local[step], rel=1e-5) for step, loss in losses(cluster.home, RUN)
    )
    remote, own = weights(cluster.home, RUN), weights(home, RUN)
    assert all((own[name] - tensor).abs().max() < 1e-4 for name, tensor in remote.items())

    model = re.search(r"^model +(\S+)", second.output, re.MULTILINE)
    assert model is not None, second.output
    judge = cluster.start(
        cluster.other, "eval", "eval", model[1], "--on", "heldout:synthetic:shapes",
        "--set", "heldout.rows=8",
    )  # fmt: skip
    assert judge.wait() == 0, judge.output
    artifact = folder / "artifact"
    (record,) = results.records_of(artifact, artifacts.describe(artifact).digest, cluster.home)
    assert record.name == "heldout" and record.figures[0].value > 0
    assert RUN in " ".join(MLflowReader(cluster.tracking, cluster.home).run_names())

    for node in (cluster.head, cluster.other):
        assert node.refused() == []
        assert "default_worker.py" in node.guarded()  # of Ray
        # both nodes had a worker, which loaded the checkpoint from its own cache
        assert any((node.folder / "home/.cache/bridgework/files").rglob("*"))
    assert set(os.listdir(cluster.head.folder.parent)) == {"a", "b", "t"}


def test_guard_refuses_the_folders_of_other_nodes(cluster: Cluster, root: Path) -> None:
    """A test without a guard would pass whatever the nodes read."""
    node = Node(root / "g", [], {})
    try:
        for code in (
            f"open({str(cluster.other.folder / 'refused.txt')!r}, 'w')",
            f"open({str(root / 'new')!r}, 'w')",
            f"import os; os.listdir({str(cluster.head.folder)!r})",
        ):
            tried = node.start("guard", "python", "-c", code)
            assert tried.wait() == 1 and tried.last_line.startswith("PermissionError")
        assert len(node.refused()) == 3
        own = node.folder / "work/own"
        tried = node.start("guard", "python", "-c", f"open({str(own)!r}, 'w').write('x')")
        assert tried.wait() == 0 and len(node.refused()) == 3
    finally:
        node.stop()
        shutil.rmtree(node.folder)


def test_nodes_that_do_not_fit_are_named(cluster: Cluster, root: Path) -> None:
    """One node with another version, and one without credentials for the store; both join."""
    shared = {"BRIDGEWORK_HOME": str(cluster.home), "MLFLOW_TRACKING_URI": cluster.tracking}
    hidden = [cluster.head.folder, cluster.other.folder]
    old = Node(root / "c", hidden, shared)
    install_other_version(old, "0.0.9")
    anonymous = Node(root / "d", hidden, shared | ANONYMOUS)
    try:
        old.start_ray(head=cluster.address, cpus=1, gpus=2)
        anonymous.start_ray(head=cluster.address, cpus=1, gpus=3)
        doctor = cluster.start(cluster.head, "doctor", "doctor", "--cluster")
        assert doctor.wait() == 1, doctor.output
        failed = re.findall(r"^no +(.+?) of \S+ +(.+)$", doctor.output, re.MULTILINE)
        found = {name: text for name, text in failed if name not in ("gpu", "free space")}
        assert set(found) == {"versions", "clock", "store"}, doctor.output
        assert f"bridgework 0.0.9, here {__version__}" in found["versions"]
        assert f"+{OFF_S} s" in found["clock"]
        assert re.search(r"NoCredentialsError|PermissionError|Forbidden", found["store"])

        for gpus, log, cause in (
            (2, "old", f"another version .* Got 0.0.9; expected {__version__}. Fix: install"),
            (3, "anonymous", "the store refuses access.* Fix: give credentials"),
        ):
            failing = cluster.train(log, log, 4, workers=1, gpus=gpus)
            assert failing.wait() == 1, failing.output
            assert re.search(cause, failing.last_line), failing.output
            assert "Traceback" not in failing.output, failing.output
            folder = cluster.home / "runs" / log / STAGE
            assert not (folder / "artifact").exists()
            assert not storage.names(folder / "checkpoints")
    finally:
        for node in (old, anonymous):
            node.stop()
