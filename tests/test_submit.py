"""`bridgework submit`: the `ray job submit` command that it builds, checked before it is run."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from bridgework.cli import app
from bridgework.cli.cluster_checks import Facts, Node, ask, checks, own_versions
from bridgework.cli.jobs import NEEDS, _jobs, _next, check_env
from bridgework.errors import BridgeworkError, ResourceError, RunError, SpecError

JOBS = [
    "train",
    "sweep",
    "eval",
    "data",
    "curate",
    "promote",
    "rollback",
    "trace",
    "export",
    "import_hf",
    "serve",
]


def dry(*words: str) -> list[str]:
    """Return the words of the command that would be run."""
    result = CliRunner().invoke(app, ["submit", "--dry-run", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return shlex.split(result.stdout)


def after(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


def test_id_of_the_job_is_the_name_of_the_run() -> None:
    words = dry("train", "llava", "--tiny", "--set", "stages.align.optim.peak_lr=1e-3")
    run = after("--submission-id", words)
    assert run.startswith("llava-tiny-")
    assert words[words.index("--") + 1 :] == [
        *[
            "python",
            "-m",
            "jobs.train",
            "llava",
            "--tiny",
            "--set",
            "stages.align.optim.peak_lr=1e-3",
            "--run",
        ],
        run,
    ]
    assert after("--submission-id", dry("train", "llava", "--run", "my/run")) == "my-run"
    assert after("--submission-id", dry("sweep", "llava_bridge")) == "sweep-llava_bridge"


def test_uploaded_package_precedes_an_installed_one_and_git_stays_here(tmp_path: Path) -> None:
    env = json.loads(after("--runtime-env-json", dry("train", "llava", "--tiny")))
    assert env["env_vars"]["PYTHONPATH"] == "platform" and ".git/" in env["excludes"]
    words = dry("--working-dir", str(tmp_path), "train", "llava", "--tiny")
    assert "PYTHONPATH" not in json.loads(after("--runtime-env-json", words))["env_vars"]
    assert words[words.index("--") + 1 :][:4] == ["python", "-m", "bridgework.cli", "train"]


def test_dependencies_of_the_project_are_installed_on_request(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\ndependencies = ["tqdm>=4"]\n')
    words = dry("--install", "--working-dir", str(tmp_path), "train", "llava", "--tiny")
    assert json.loads(after("--runtime-env-json", words))["pip"] == ["tqdm>=4"]
    with pytest.raises(SpecError, match=r"--install: .*pyproject\.toml cannot be read"):
        dry("--install", "--working-dir", str(tmp_path / ".."), "train", "llava", "--tiny")


def test_variables_are_given_by_name_and_never_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    words = dry("--env", "HF_TOKEN", "--env", "OTHER", "eval", "llava")
    assert "secret" not in " ".join(words)
    given = json.loads(after("--runtime-env-json", words))["env_vars"][NEEDS]
    assert given == "HF_TOKEN,OTHER"
    with pytest.raises(
        SpecError, match=r"--env: not the name of a variable\. Got 'HF_TOKEN'"
    ) as said:
        dry("--env", "HF_TOKEN=secret", "eval", "llava")
    assert "secret" not in str(said.value)
    monkeypatch.setenv(NEEDS, given)
    with pytest.raises(ResourceError, match="OTHER: the variable is not set"):
        check_env()
    monkeypatch.setenv("OTHER", "x")
    check_env()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("train llavva", "no system 'llavva'; did you mean 'llava'"),
        ("train llava --set stages.align.optim.peek_lr=1", "did you mean 'peak_lr'"),
        ("submit train llava", "a job cannot submit itself"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_uploaded(words: str, error: str) -> None:
    with pytest.raises(BridgeworkError, match=error):
        dry(*words.split())


def test_gpus_of_the_own_process_are_requested_of_ray() -> None:
    words = dry("--gpus", "1", "--cpus", "2", "import", "hf", "a", "b")
    assert after("--entrypoint-num-gpus", words) == "1"
    assert after("--entrypoint-num-cpus", words) == "2"
    assert words[words.index("--") + 1 :] == ["python", "-m", "jobs.import_hf", "a", "b"]


def test_run_that_is_submitted_again_gets_another_id() -> None:
    other = ("run-2", "RUNNING")
    assert _next("run", [other]) == "run"
    assert _next("run", [("run", "FAILED"), other]) == "run-try2"
    assert _next("run", [("run", "FAILED"), ("run-try2", "STOPPED")]) == "run-try3"
    with pytest.raises(RunError, match=r"has a job that has not ended\. Got run, RUNNING"):
        _next("run", [("run", "RUNNING")])


def test_cluster_that_is_not_named_or_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ResourceError, match=r"no cluster is named\. Fix: export RAY_API_SERVER"):
        _jobs(None)
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:9: the cluster cannot be joined.*Fix: "):
        _jobs("http://127.0.0.1:9")


class Refusing(BaseHTTPRequestHandler):
    """A job server that refuses, as that of Ray: 401 without a token, 403 for a wrong one."""

    status: ClassVar[int]

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"Unauthorized: Missing authentication token")

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.mark.parametrize("status", [401, 403])
def test_job_server_that_refuses_the_token_is_one_line_with_a_fix(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refusing, "status", status, raising=False)
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(
            ResourceError, match=r"cannot be joined\..*Fix: export RAY_AUTH_MODE"
        ) as raised:
            _jobs(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", JOBS)
def test_every_command_is_a_job(name: str) -> None:
    job = import_module(f"jobs.{name}")
    first = (job.__doc__ or "").splitlines()[0]
    assert first == f"`bridgework {name.replace('_', ' ')}` as a Ray job, with the same arguments."


def test_job_ends_with_one_line_and_an_exit_code() -> None:
    command = [sys.executable, "-m", "jobs.rollback", "llava:3:4", "--project"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", "llavva"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "did you mean 'llava'" in done.stderr.splitlines()[-1]


GOOD = Facts(
    versions=own_versions(), clock=100.0, reads="", writes="", free_gib=50.0, tracking="",
    unreachable=(), gpus=0, nccl=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        ("answers", RuntimeError("no module named bridgework")),
        ("answers", TimeoutError("no answer within 300 s")),
        ("versions", replace(GOOD, versions=own_versions() | {"bridgework": "0.0.1"})),
        ("clock", replace(GOOD, clock=700.0)),
        ("store", replace(GOOD, reads="FileNotFoundError: x")),
        ("store", replace(GOOD, writes="PermissionError: x")),
        ("store", replace(GOOD, store_s=30.0)),
        ("ports", replace(GOOD, unreachable=("b (10.0.0.2:8076: timed out)",))),
        ("tracking server", replace(GOOD, tracking="HTTPError: 401")),
        ("free space", replace(GOOD, free_gib=1.0)),
        ("gpu", replace(GOOD, gpus=0)),
        ("gpu", replace(GOOD, gpus=4, nccl=False)),
    ],
)
def test_node_that_differs_is_named_with_a_fix(check: str, answer: Facts | Exception) -> None:
    good = Node("a", 0.0, GOOD, sent=95.0, received=105.0)
    bad = Node("b", 4.0 if check == "gpu" else 0.0, answer, sent=95.0, received=105.0)
    found = checks([good, bad], own_versions(), "http://tracking")
    (wrong,) = [each for each in found if not each.ok]
    assert wrong.name == f"{check} of b" and wrong.found and wrong.advice
    assert all(each.ok for each in checks([good], own_versions(), ""))


@pytest.mark.usefixtures("ray_session")
def test_every_node_answers_and_leaves_no_files(home: Path) -> None:
    (node,) = ask(str(home), "http://127.0.0.1:9")
    assert isinstance(node.answer, Facts), node.answer
    assert (node.answer.reads, node.answer.writes, node.answer.unreachable) == ("", "", ())
    assert node.answer.tracking.startswith("URLError")
    assert list((home / "doctor").iterdir()) == []
    wrong = [
        each.name.partition(" of ")[0]
        for each in checks([node], own_versions(), "http://127.0.0.1:9")
        if not each.ok
    ]
    assert set(wrong) - {"free space"} == {"tracking server"}
