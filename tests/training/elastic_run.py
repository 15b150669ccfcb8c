"""Train on a cluster of fake nodes that come and go; prints the notices of the run.

python -m tests.training.elastic_run HOME RUN STEPS FEWEST MOST TIMEOUT EVENT..; an event is a method of `Nodes`, or
`train=N`, or `until=TEXT`. Each node offers one fake GPU, and
the tiny stage then trains on its CPU. The head offers CPUs for the readers.
"""

import io
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ |= {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
}
os.environ |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from rich.console import Console

from bridgework.config import override
from bridgework.errors import BridgeworkError
from bridgework.system import System
from bridgework.training.driver import train
from bridgework.training.options import RunOptions
from tests.training import test_dropout as dropout
from tests.training.support import losses

WAIT_S = 240


STAGE = "instruct"


def system(steps: int) -> System:
    """A stage with dropout, in ZeRO 2, whose state is converted for another number of workers."""
    changes = {"stages.*.budget.steps": steps, "stages.*.zero.stage": 2}
    return override(dropout.system("adapters", 4), changes)


class Nodes:
    def __init__(self, home: Path, run: str) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        self._home, self._run = home, run
        self._nodes: list[Any] = []
        self.address = self._cluster.address

    def add(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=1, num_gpus=1))

    def kill(self) -> None:
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def drain(self) -> None:
        """Announce that the newest node is taken away in 8 s, as a cloud does, and take it away then."""
        node, deadline = self._nodes[-1], time.time() + 8
        given = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", int(deadline * 1000)
        GcsClient(address=self.address).drain_node(node.node_id, *given)
        time.sleep(deadline - time.time())
        self.kill()

    def train(self, steps: int) -> None:
        """Wait until that many steps more are done."""
        begin, until = len(losses(self._home, self._run, STAGE)), time.monotonic() + WAIT_S
        while (
            len(losses(self._home, self._run, STAGE)) < begin + steps and time.monotonic() < until
        ):
            time.sleep(0.2)

    def until(self, said: Callable[[], str], text: str) -> None:
        until = time.monotonic() + WAIT_S
        while text not in said() and time.monotonic() < until:
            time.sleep(0.2)

    def shutdown(self) -> None:
        self._cluster.shutdown()


def main(
    home: Path, run: str, steps: int, workers: tuple[int, int], timeout_s: float, events: list[str]
) -> None:
    nodes, said = Nodes(home, run), io.StringIO()
    console = Console(file=said, width=400)
    ray.init(address=nodes.address, log_to_driver=False)
    nodes.add()

    options = RunOptions(
        workers=workers if workers[0] < workers[1] else workers[0],
        resize_every_s=3.0,
        checkpoint_every=10**6,
        gpus_per_worker=1,
        resource_timeout_s=timeout_s,
    )

    def work() -> None:
        try:
            train(
                system(steps),
                home=home,
                run=run,
                options=options,
                stages=[STAGE],
                console=console,
            )
        except BridgeworkError as error:
            said.write(f"error {error}\n")

    began = time.monotonic()
    thread = threading.Thread(target=work)  # a node can be added in the main thread only
    thread.start()
    for event in events:
        name, _, value = event.partition("=")
        print(f"{time.monotonic() - began:.1f} s: {event}", flush=True)
        if name == "train":
            nodes.train(int(value))
        elif name == "until":
            nodes.until(said.getvalue, value)
        else:
            getattr(nodes, name)()
    thread.join()
    print(f"{time.monotonic() - began:.1f} s: end")
    print(said.getvalue())
    ray.shutdown()
    nodes.shutdown()


if __name__ == "__main__":
    home, run, steps, least, most, timeout, *events = sys.argv[1:]
    main(Path(home), run, int(steps), (int(least), int(most)), float(timeout), events)
