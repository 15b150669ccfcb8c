"""Two tiny models with random weights, registered, and the apps over them in one Serve."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from ray import serve

from bridgework import artifacts
from bridgework.serving import app as apps_of
from bridgework.serving import launch
from bridgework.serving.auth import VARIABLE
from bridgework.system import System, load
from bridgework.tracking.mlflow_store import MLflowTracker
from tests.serving.support import KEY, ORIGIN, Apps, embed_and_caption


@pytest.fixture(scope="session")
def system() -> System:
    return load("llava").tiny()


def tiny_artifact(folder: Path, system: System, seed: int, stage: str = "instruct") -> str:
    torch.manual_seed(seed)
    model = system[stage].model.build()
    artifacts.save(folder, model.state_dict(), system=system, stage=stage)
    return str(folder)


@pytest.fixture(scope="session")
def pairs_only(home: Path, system: System) -> str:
    """Weights of a stage whose template has images and captions but no questions."""
    return tiny_artifact(home / "align", system, 0, "align")


@pytest.fixture(scope="session")
def weights(home: Path, system: System) -> str:
    return tiny_artifact(home / "weights", system, 0)


@pytest.fixture(scope="session")
def registered(home: Path, system: System, weights: str) -> str:
    """Registered model `tiny` with a champion (version 1) and a challenger (version 2)."""
    tracker = MLflowTracker(None, home, "serving")
    run = tracker.start("train")
    for number, folder in enumerate((weights, tiny_artifact(home / "others", system, 1)), 1):
        logged = tracker.output(run, "tiny", folder, {})
        version = tracker.register("tiny", logged, run, folder, {})
        tracker.alias("tiny", ("champion", "challenger")[number - 1], version.version)
    tracker.finish(run)
    return "tiny"


@pytest.fixture(scope="module")
def apps(ray_session: None, home: Path, registered: str, weights: str) -> Iterator[Apps]:
    common = {"cpus": 0.5, "ongoing": 4, "queued": 8, "max_new_tokens": 400, "home": str(home)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, KEY)
        shared = {
            "model": registered,
            "challenger": "tiny@challenger",
            "share": 0.5,
            "cors": ORIGIN,
        }
        address = launch.start(
            "chat", shared | common, launch.AppAddress(port=launch.free_port())
        ).address
        both = apps_of.application("embed", {"model": weights} | common, embed_and_caption)
        serve.run(both, name="embed", route_prefix="/embed")
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=address, headers=headers, timeout=300, trust_env=False) as http:
        clients = [
            openai.OpenAI(
                api_key=KEY,
                base_url=f"{address}{path}/v1",
                max_retries=0,
                timeout=300,
                http_client=http,
            )
            for path in ("", "/embed")
        ]
        yield Apps(address, *clients, http, home)
    serve.shutdown()
