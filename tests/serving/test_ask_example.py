"""The last command of every guide in docs/cluster.md: a question to a served model."""

import os
import subprocess
import sys

from tests.house import source
from tests.serving.support import KEY, Apps


def ask(*words: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.ask", *words],
        cwd=source.ROOT,
        env={**os.environ, "BRIDGEWORK_KEY": key, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_example_prints_an_answer_and_its_id(apps: Apps) -> None:
    done = ask("--url", f"{apps.address}/v1", "--tokens", "4")
    assert done.returncode == 0, done.stderr
    *answer, identity = done.stdout.splitlines()
    assert answer[0].startswith("tiny: ") and identity.startswith("chatcmpl-")


def test_a_refusal_is_one_line(apps: Apps) -> None:
    done = ask("--url", f"{apps.address}/v1", key="wrong")
    assert done.returncode == 1 and done.stderr.startswith("error  http")
    assert len(done.stderr.splitlines()) == 1
