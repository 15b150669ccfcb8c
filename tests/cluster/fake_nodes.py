"""Nodes for Ray's autoscaler that are `ray start --block` processes on this machine.

The nodes of the provider in Ray's wheel share one folder. There, a node that unpacks the working
directory of a job deletes that of the others. Here each node has its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"  # variable of the processes of a node


class Provider(FakeMultiNodeProvider):
    """Starts and ends nodes. provider_config: `folder` of the nodes, and `gcs_address`."""

    def _create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        with self.lock:
            node, given = self._next_hex_node_id(), dict(resources)
            kind = tags[TAG_RAY_USER_NODE_TYPE]
            command = [
                str(Path(sys.executable).with_name("ray")), "start", "--block",
                f"--address={self._gcs_address}", "--node-ip-address=127.0.0.1",
                f"--num-cpus={given.pop('CPU', 0):g}", f"--num-gpus={given.pop('GPU', 0):g}",
                f"--resources={json.dumps(given)}", "--min-worker-port=0", "--max-worker-port=0",
                "--dashboard-agent-listen-port=0",
                f"--temp-dir={self.provider_config['folder']}/{node[-2:]}",
            ]  # fmt: skip
            env = {NODE_ID: node, "RAY_CLOUD_INSTANCE_ID": node, "RAY_NODE_TYPE_NAME": kind}
            log = Path(self.provider_config["folder"], f"node-{node[-2:]}.log")
            with log.open("w") as file:
                process = subprocess.Popen(command, env=os.environ | env, stdout=file, stderr=file)
            own = {
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_USER_NODE_TYPE: kind,
                TAG_RAY_NODE_NAME: node,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._nodes[node] = {"tags": own | tags, "process": process}

    def _terminate_node(self, node: dict[str, Any]) -> None:
        node["process"].terminate()
