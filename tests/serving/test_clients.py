"""Client libraries on a served model, called as their documentation does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.clients.__main__ import VARIABLE
from examples.clients.trials import TRIALS, Target, results
from tests.house import source
from tests.serving.support import KEY, ServeChat


def test_the_openai_client_works_unchanged(
    serve_chat: ServeChat, home: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with serve_chat(home, model=weights) as http:
        target = Target(f"{str(http.base_url).rstrip('/')}/v1", "weights", KEY)
        found = results(target, ["openai"])
    assert [one for one in found if not one["passed"]] == []
    assert len(found) == len(TRIALS["openai"])


@pytest.mark.slow
@pytest.mark.skipif(
    VARIABLE not in os.environ,
    reason=f"{VARIABLE} names no environment of the libraries, see examples/clients/README.md",
)
def test_every_library_works_unchanged(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.clients"],
        cwd=source.ROOT,
        env={**os.environ, "BRIDGEWORK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=540,
    )
    found = json.loads((tmp_path / "clients.json").read_text())["trials"]
    assert [one for one in found if not one["passed"]] == []
    assert done.returncode == 0, done.stdout
    assert {one["library"] for one in found} == set(TRIALS)
