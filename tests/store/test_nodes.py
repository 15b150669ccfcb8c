"""Two nodes that share nothing but a store and Ray: neither sees the folders of the other."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from bridgework.serving.launch import free_port
from tests.conftest import RAY_ENVIRONMENT
from tests.training.support import go, llava, losses, weights

pytestmark = pytest.mark.slow
TRAIN = """
import ray
from pathlib import Path
from bridgework import storage
from bridgework.training import checkpoint
from tests.training.support import go, llava

ray.init(log_to_driver=False)
home = storage.home()
assert not Path("{other}/home").exists()
go(llava(6), home, "run", workers=2, checkpoint_every=2)
nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
print("nodes", len(nodes))
"""


class Node(NamedTuple):
    """A fake node: a mount namespace in which the other node's folder is empty."""

    folder: Path
    other: Path
    environment: dict[str, str]

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Start a command with a HOME and a TMPDIR of its own."""
        hidden = 'mount -t tmpfs none "$1" && shift && exec "$@"'
        words = ["unshare", "-m", "sh", "-c", hidden, "sh", str(self.other), *command]
        return subprocess.Popen(
            words, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )


@pytest.fixture
def nodes(tmp_path: Path, place: Path) -> Iterator[tuple[Node, Node]]:
    """A Ray of two nodes with one CPU each; the processes that it started end with it."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("hiding a folder takes root")
    address = f"127.0.0.1:{free_port()}"
    folders = [tmp_path / name for name in "ab"]
    made = []
    for folder, other in zip(folders, folders[::-1], strict=True):
        for name in ("home", "tmp"):
            (folder / name).mkdir(parents=True)
        changes = {
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "BRIDGEWORK_HOME": str(place),
            "RAY_ADDRESS": address,
            "PYTHONPATH": os.pathsep.join(("platform", ".")),
        }
        kept = {k: v for k, v in os.environ.items() if k != "BRIDGEWORK_CACHE"}
        made.append(Node(folder, other, kept | RAY_ENVIRONMENT | changes))
    ray = str(Path(sys.executable).with_name("ray"))
    options = ("--num-cpus=1", "--block", "--disable-usage-stats")
    head, worker = made
    started = [
        head.start(
            ray, "start", "--head", f"--port={address.split(':')[1]}", "--include-dashboard=false",
            f"--temp-dir={head.folder}/tmp/r", *options,
        )
    ]  # fmt: skip
    time.sleep(10)
    started.append(
        worker.start(
            ray, "start", f"--address={address}", f"--temp-dir={worker.folder}/tmp/r", *options
        )
    )
    yield head, worker
    for process in reversed(started):
        process.terminate()
        process.communicate(timeout=60)


def test_nodes_that_share_only_a_store_train_one_run(
    nodes: tuple[Node, Node], home: Path, place: Path
) -> None:
    head, worker = nodes
    driver = head.start(sys.executable, "-c", TRAIN.format(other=head.other))
    said, _ = driver.communicate(timeout=500)
    assert driver.returncode == 0, said
    assert "nodes 2" in said
    go(llava(6), home, "nodes")
    local, remote = weights(home, "nodes"), weights(place, "run")
    assert all((local[n] - t).abs().max() < 1e-5 for n, t in remote.items())
    assert [step for step, _ in losses(place, "run")] == list(range(6))
    for node in (head, worker):
        assert any((node.folder / "home" / ".cache" / "bridgework" / "files").rglob("*"))
