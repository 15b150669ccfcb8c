"""Two tiny models with random weights, registered, and the apps over them in one Serve."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
import torch
from ray import serve

from bridgework import artifacts
from bridgework.data.dataset import write
from bridgework.data.samples import Part, Sample
from bridgework.inference.pipeline import Pipeline
from bridgework.serving import app as apps_of
from bridgework.serving import launch
from bridgework.serving.auth import VARIABLE
from bridgework.system import System, load
from bridgework.tracking.mlflow_store import MLflowTracker
from tests.serving.support import (
    KEY,
    ORIGIN,
    QUESTIONS,
    Apps,
    ModelHome,
    ServeChat,
    chat_app,
    embed_and_caption,
    picture,
)


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


@pytest.fixture(scope="module")
def serve_chat(ray_session: None) -> Iterator[ServeChat]:
    """Start a Serve without apps; the value serves the chat app of a `ModelHome`."""
    serve.shutdown()
    port = launch.free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield partial(chat_app, port)
    serve.shutdown()


@pytest.fixture
def model_home(tmp_path: Path, system: System, weights: str) -> ModelHome:
    """Version 1 answers the probes; 2 has the same weights, 3 answers noise."""
    tracker = MLflowTracker(None, tmp_path, "training")
    run = tracker.start("train")
    folders = [weights, weights, tiny_artifact(tmp_path / "noise", system, 7)]
    for number, folder in enumerate(folders, 1):
        tags = {"quality": str(number), "digest": artifacts.describe(folder).digest}
        logged = tracker.output(run, f"m{number}", folder, tags)
        tracker.register("m", logged, run, folder, tags)
    tracker.finish(run)
    tracker.alias("m", "champion", "1")
    tracker.alias("m", "challenger", "2")
    pipeline = Pipeline.load(weights, "cpu")
    samples = []
    for number in range(QUESTIONS):
        question = [Part("user", image=0), Part("user", text=f"\nWhat is {number}?")]
        image = picture("red", (40, 30 + number))
        said = pipeline.generate(question, [image], max_new_tokens=64).text
        samples.append(Sample(str(number), (image,), (*question, Part("assistant", text=said))))
    probes = tmp_path / "datasets" / "probes"
    write(samples, str(probes), source="the champion's answers", license="CC0", made_by="test")
    return ModelHome(tmp_path, str(probes))
