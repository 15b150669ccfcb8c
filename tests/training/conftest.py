"""Runs of tiny systems in the home of the session, each under the name of its test."""

import os
import re

import pytest
import torch.distributed as dist


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W+", "-", request.node.name).strip("-")


@pytest.fixture(scope="session")
def process_group() -> None:
    """A group of one, for what DeepSpeed runs in this process; it stays, as DeepSpeed remembers the first it sees."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
