"""Before an app runs: its arguments, its model, its port."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from bridgework.errors import BridgeworkError, ResourceError, SpecError, TrackingError, WeightsError
from bridgework.serving import apps, launch
from bridgework.serving.auth import VARIABLE
from bridgework.serving.options import Options, read
from bridgework.serving.resolve import record, resolve


def test_words_of_a_command_line_become_options_in_any_order() -> None:
    words = {
        "share": "0.25",
        "max_replicas": "3",
        "limits.images": "2",
        "challenger": "b",
        "replicas": "2",
        "model": "a",
    }
    options = read(words)
    assert (options.share, options.challenger, options.limits.images) == (0.25, "b", 2)
    assert options.places == 3 * options.ongoing + options.queued


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "model= is missing"),
        ({"model": "a", "replics": 2}, "did you mean 'replicas'"),
        ({"model": "a", "limits.image": 2}, "did you mean 'images'"),
        ({"model": "a", "share": 0.1}, "without a challenger"),
        ({"model": "a", "share": 1.1}, r"share lies in \[0, 1\]"),
        ({"model": "a", "replicas": 0}, "replicas must be at least 1"),
        ({"model": "a", "replicas": 4, "max_replicas": 2}, "max_replicas 2 is below replicas 4"),
    ],
)
def test_wrong_words_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read(words)


@pytest.mark.parametrize("word", ["tiny", "tiny@champion", "tiny:1"])
def test_a_model_is_found_by_name_alias_and_version(word: str, registered: str, weights: str, home: Path) -> None:
    served = resolve("chat", word, Options(model=word), home)
    assert (served.model, served.version, served.artefact, served.pinned) == ("tiny", "1", weights, "tiny:1")


def test_an_unknown_model_or_folder_is_an_error_that_says_so(registered: str, home: Path, tmp_path: Path) -> None:
    wrong: list[tuple[str, type[BridgeworkError], str]] = [
        ("tinny", TrackingError, "did you mean 'tiny'"),
        ("tiny@challenge", TrackingError, "did you mean 'challenger'"),
        (str(tmp_path), WeightsError, "not an artefact"),
    ]
    for word, kind, message in wrong:
        with pytest.raises(kind, match=message):
            resolve("chat", word, Options(model=word), home)


def test_the_same_weights_are_the_same_deployment_and_keep_their_first_start(weights: str, tmp_path: Path) -> None:
    served = resolve("chat", weights, Options(model=weights), tmp_path)
    file = record(served, tmp_path)
    before = file.read_text()
    assert record(resolve("chat", weights, Options(model=weights), tmp_path), tmp_path).read_text() == before
    assert json.loads(before)["digest"] == served.digest
    assert resolve("embed", weights, Options(model=weights), tmp_path).id != served.id


@pytest.mark.parametrize("name", apps.APPS)
def test_an_app_is_built_with_a_key_and_not_without(
    name: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"model": weights, "home": str(tmp_path)}
    monkeypatch.setenv(VARIABLE, "key")
    apps.APPS[name](args)
    assert [json.loads(f.read_text())["app"] for f in (tmp_path / "deployments").iterdir()] == [name]
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(SpecError, match="no API key"):
        apps.APPS[name](args)


def test_a_port_in_use_is_named_with_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"port {port} of 127.0.0.1 cannot be used .*; port \d+ is free"):
            launch.start("chat", {"model": "tiny"}, port=port)


def test_an_unknown_app_and_a_development_server_for_all_are_refused() -> None:
    with pytest.raises(SpecError, match="did you mean 'chat'"):
        launch.start("chatt", {"model": "tiny"})
    for word in (True, "true"):
        with pytest.raises(SpecError, match="loopback only"):
            launch.start("chat", {"model": "tiny", "dev": word}, host="0.0.0.0")
