"""Start of an app: arguments, model, port, config and shutdown."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray._common.utils import import_attr
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from bridgework.errors import (
    BridgeworkError,
    ResourceError,
    RunError,
    SpecError,
    TrackingError,
    WeightsError,
)
from bridgework.serving import app as apps
from bridgework.serving import launch
from bridgework.serving.auth import VARIABLE
from bridgework.serving.gateway import Gateway
from bridgework.serving.models import Replica, record_deployment, resolve_model
from bridgework.serving.options import Options, parse_options
from bridgework.serving.routes import caption_routes
from tests.serving.support import ENDLESS


def test_replica_and_gateway_on_a_node_with_another_version_end_before_they_load() -> None:
    options, refusal = Options(model="llava"), r"another version of bridgework.*expected 0\.0\.0"
    with pytest.raises(RunError, match=refusal):
        Replica("nowhere", options, "0.0.0")
    with pytest.raises(RunError, match=refusal):
        Gateway("caption", "0.0.0", caption_routes, options, None, [])


def test_gateway_starts_without_torch_and_mlflow() -> None:
    program = (
        "import sys, bridgework.serving.gateway, bridgework.serving.playground; "
        "print(sorted({'torch', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]"


def test_command_line_arguments_become_options_in_any_order() -> None:
    words = {
        "share": "0.25",
        "max_replicas": "3",
        "limits.images": "2",
        "challenger": "b",
        "replicas": "2",
        "model": "a",
    }
    options = parse_options(words)
    assert (options.share, options.challenger, options.limits.images) == (0.25, "b", 2)
    assert options.slots == 3 * options.ongoing + options.queued


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "model= is missing"),
        ({"model": "a", "replics": 2}, "did you mean 'replicas'"),
        ({"model": "a", "limits.image": 2}, "did you mean 'images'"),
        ({"model": "a", "share": 0.1}, "without a challenger"),
        ({"model": "a", "share": 1.1}, r"share must be in \[0, 1\]"),
        ({"model": "a", "cors": "https://a.example/"}, "not an origin"),
        ({"model": "a", "per_key": 0}, "per_key must be at least 1"),
        ({"model": "a", "held_bytes": 2**20}, "below limits.body_bytes"),
        ({"model": "a", "limits.messages": 5000}, "limits.messages must be at most 4096"),
        ({"model": "a", "replicas": 0}, "replicas must be at least 1"),
        ({"model": "a", "replicas": 4, "max_replicas": 2}, "max_replicas 2 is below replicas 4"),
    ],
)
def test_wrong_arguments_are_rejected(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_options(words)


@pytest.mark.parametrize("word", ["tiny", "tiny@champion", "tiny:1"])
def test_model_is_resolved_by_name_alias_and_version(
    word: str, registered: str, weights: str, home: Path
) -> None:
    served = resolve_model("chat", word, Options(model=word), home)
    assert (served.model, served.version, served.artifact, served.pinned) == (
        "tiny",
        "1",
        weights,
        "tiny:1",
    )


def test_unknown_model_or_folder_is_an_error(registered: str, home: Path, tmp_path: Path) -> None:
    wrong: list[tuple[str, type[BridgeworkError], str]] = [
        ("tinny", TrackingError, "did you mean 'tiny'"),
        ("tiny@challenge", TrackingError, "did you mean 'challenger'"),
        (str(tmp_path), WeightsError, "not an artifact"),
    ]
    for word, kind, message in wrong:
        with pytest.raises(kind, match=message):
            resolve_model("chat", word, Options(model=word), home)


def test_same_weights_are_the_same_deployment_with_the_first_start_time(
    weights: str, tmp_path: Path
) -> None:
    served = resolve_model("chat", weights, Options(model=weights), tmp_path)
    file = record_deployment(served, tmp_path)
    before = file.read_text()
    assert (
        record_deployment(
            resolve_model("chat", weights, Options(model=weights), tmp_path), tmp_path
        ).read_text()
        == before
    )
    assert json.loads(before)["digest"] == served.digest
    assert resolve_model("embed", weights, Options(model=weights), tmp_path).id != served.id


@pytest.mark.parametrize("name", apps.APPS)
def test_app_needs_a_key(
    name: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"model": weights, "home": str(tmp_path)}
    monkeypatch.setenv(VARIABLE, "key")
    apps.APPS[name](args)
    assert [json.loads(f.read_text())["app"] for f in (tmp_path / "deployments").iterdir()] == [
        name
    ]
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(SpecError, match="no API key"):
        apps.APPS[name](args)


def test_port_in_use_is_an_error_with_a_free_port(registered: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ResourceError, match=rf"port {port} of 127.0.0.1 cannot be used .*port \d+ is free"
        ):
            launch.start("chat", {"model": registered, "dev": True}, launch.AppAddress(port=port))


def test_unknown_app_and_public_development_server_are_rejected() -> None:
    with pytest.raises(SpecError, match="did you mean 'chat'"):
        launch.start("chatt", {"model": "tiny"}, launch.AppAddress())
    for word in (True, "true"):
        with pytest.raises(SpecError, match="loopback only"):
            launch.start("chat", {"model": "tiny", "dev": word}, launch.AppAddress(host="0.0.0.0"))
    with pytest.raises(SpecError, match="name the origins"):
        parse_options({"model": "tiny", "dev": True, "cors": "*"})


def test_written_config_is_valid_for_serve(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "key")
    file, args = (
        tmp_path / "serve.yaml",
        {"model": weights, "home": str(tmp_path), "limits.images": "4"},
    )
    launch.write_config(
        file, "chat", args, launch.AppAddress(port=8123, name="llava", route_prefix="/llava")
    )
    config = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    (app,) = config.applications
    assert (app.name, app.route_prefix, config.http_options.port) == ("llava", "/llava", 8123)
    built = call_user_app_builder_with_args_if_necessary(import_attr(app.import_path), app.args)
    assert isinstance(built, Application)
    for wrong in ({"modle": weights}, {"model": weights, "replicas": "0"}):
        with pytest.raises(SpecError):
            launch.write_config(file, "chat", wrong, launch.AppAddress())


@pytest.fixture
def clean(ray_session: None) -> Iterator[None]:
    """Ray without Serve, before and after the test."""
    serve.shutdown()
    yield
    serve.shutdown()


def ask(address: str, **changes: Any) -> httpx.Response:
    body = {"model": "weights", "messages": [{"role": "user", "content": "x"}]} | changes
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300, trust_env=False)


@pytest.mark.slow
def test_apps_of_one_ray_are_independent_and_complete_running_requests(
    clean: None, weights: str, tmp_path: Path
) -> None:
    args = {
        "model": weights,
        "dev": True,
        "home": str(tmp_path),
        "cpus": 0.5,
        "max_new_tokens": 400,
    }
    port = launch.free_port()
    first = launch.start("chat", args, launch.AppAddress(port=port))
    with pytest.raises(SpecError, match=r"'chat' already runs on this Ray.*--name chat-2"):
        launch.start("chat", args, launch.AppAddress(port=port))
    with pytest.raises(SpecError, match=r"the path / is taken"):
        launch.start("chat", args, launch.AppAddress(port=port, name="other"))
    with pytest.raises(ResourceError, match="already serves, and not on port"):
        launch.start(
            "chat",
            args,
            launch.AppAddress(port=launch.free_port(), name="other", route_prefix="/other"),
        )
    assert ask(first.address, max_tokens=1).status_code == 200
    second = launch.start(
        "chat", args, launch.AppAddress(port=port, name="other", route_prefix="/other")
    )
    assert not second.own_serve
    assert ask(second.address, max_tokens=1).status_code == 200
    assert second.stop() == 0
    assert serve.status().applications.keys() == {"chat"}

    def terminate() -> list[httpx.Response]:
        with ThreadPoolExecutor(6) as pool:
            # 48 answers of 400 tokens, so that all six still run when the signal comes
            replies = [pool.submit(ask, first.address, n=8, **ENDLESS) for _ in range(6)]
            while running() < 6:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            return [reply.result() for reply in replies]

    with ThreadPoolExecutor(1) as pool:
        replies = pool.submit(terminate)
        assert launch.wait(first) == 0
    assert [reply.status_code for reply in replies.result()] == [200] * 6
    assert all(reply.json()["choices"][0]["finish_reason"] for reply in replies.result())
    assert not serve.status().applications


def running() -> int:
    """Return the number of requests that the gateway of the app "chat" holds."""
    return int(serve.get_app_handle("chat").running.remote().result())
