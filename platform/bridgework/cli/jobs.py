"""`bridgework submit WORDS...`: run a command as a Ray job on a cluster, and follow its log."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bridgework.config import override
from bridgework.data.catalog import home
from bridgework.errors import ResourceError, RunError, SpecError, suggest
from bridgework.ray_utils import SAY_EVERY_S
from bridgework.system import load

NEEDS = "BRIDGEWORK_NEEDS_ENV"  # names of variables that the job's environment must have
STOP_S = 600  # time for a checkpoint between SIGTERM and SIGKILL of `ray job stop`; Ray's is 3
# in addition to the files that git ignores, which Ray leaves out too
EXCLUDES = (".git/", ".venv/", ".bridgework/", ".mypy_cache/", ".pytest_cache/", ".ruff_cache/")
OVER = frozenset({"SUCCEEDED", "STOPPED", "FAILED"})  # states of a job that has ended

out, err = (
    Console(stderr=stderr, markup=False, highlight=False, soft_wrap=True)
    for stderr in (False, True)
)


def submit(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND...", help="A command of bridgework with its arguments."),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            help="Job server, e.g. http://localhost:8265.",
            show_default="RAY_API_SERVER_ADDRESS",
        ),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder that is uploaded: your recipes and sweeps.")
    ] = Path("."),
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A variable that the cluster's nodes must have, e.g. HF_TOKEN. Repeat for more.",
        ),
    ] = None,
    install: Annotated[
        bool,
        typer.Option(
            "--install", help="Install the dependencies of the folder's pyproject.toml for the job."
        ),
    ] = False,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of the command's own process.")] = 0.0,
    gpus: Annotated[
        float,
        typer.Option(min=0, help="GPUs of the command's own process, e.g. 1 for `eval`."),
    ] = 0.0,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not follow the log until the job ends.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the `ray job submit` command instead.")
    ] = False,
) -> None:
    """Submit a command as a Ray job and follow its log; the same words again resume.

    The words are checked before anything is uploaded. The id of the job is the name of the run. The
    log is followed until the job ends, and its exit code is 0 or 1. Ctrl-C stops the following, not
    the job.
    """
    parsed, arguments = _parse(context.find_root().command, words)
    named = _named(env)
    run, words = _run(parsed, arguments, words)
    ids = [] if dry_run else [*_jobs(address)]
    command = [
        str(Path(sys.executable).with_name("ray")), "job", "submit",
        *(["--address", address] if address else []),
        "--submission-id", _next(run, ids),
        "--working-dir", str(working_dir),
        "--runtime-env-json", json.dumps(_runtime_env(working_dir, named, install)),
        *(["--entrypoint-num-cpus", f"{cpus:g}"] if cpus else []),
        *(["--entrypoint-num-gpus", f"{gpus:g}"] if gpus else []),
        *(["--no-wait"] if no_wait else []),
        "--", "python", "-m", *_entrypoint(working_dir, words),
    ]  # fmt: skip
    if dry_run:
        out.print(shlex.join(["ray", *command[1:]]))
        return
    raise typer.Exit(_follow(command, address, command[command.index("--submission-id") + 1]))


def _follow(command: list[str], address: str | None, job: str) -> int:
    """Run the command and return its exit code; reports a job that waits for its resources."""
    started, pending = time.monotonic(), True
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait(SAY_EVERY_S)
            except subprocess.TimeoutExpired:
                pending = pending and dict(_jobs(address)).get(job, "PENDING") == "PENDING"
            if pending:
                err.print(f"{job}: waits for its resources; {time.monotonic() - started:.0f} s")


def _parse(root: Any, words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the command that the words name, and its parameters. Raises as the command would."""
    command, names, rest = root, list[str](), list(words)
    found = command.make_context("bridgework", list(rest))
    while hasattr(command, "resolve_command") and rest:
        name, command, rest = command.resolve_command(found, rest)
        names.append(name or "")
        found = command.make_context(name, list(rest), parent=found)
    if names == ["submit"]:
        raise SpecError("submit: a job cannot submit itself. Got submit; expected e.g. train llava")
    return " ".join(names), found.params


def _run(name: str, arguments: dict[str, Any], words: list[str]) -> tuple[str, list[str]]:
    """Return the name of the run, and the words with it, so that another submission resumes."""
    if arguments.get("run"):
        return str(arguments["run"]), words
    if name == "train":
        from bridgework.cli.options import changes
        from bridgework.training.run_dir import default_name

        given = load(arguments["system"])
        system = override(given.tiny() if arguments["tiny"] else given, changes(arguments["set_"]))
        prefix = re.sub("[:.]", "-", arguments["system"]) + "-tiny" * arguments["tiny"]
        run = default_name(prefix, system, home())
        return run, [*words, "--run", run]
    if name == "sweep":
        return f"sweep-{arguments['space']}", words
    return f"{name.replace(' ', '-')}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}", words


def _next(run: str, jobs: list[tuple[str, str]]) -> str:
    """Return the id of the next job of a run: its name, with a number from the second job on.

    Raises RunError if a job of the run has not ended.
    """
    base = re.sub(r"[^\w.-]+", "-", run)
    own = {i: state for i, state in jobs if re.fullmatch(rf"{re.escape(base)}(-try\d+)?", i)}
    for submitted, state in own.items():
        if state not in OVER:
            raise RunError(
                f"submit: run {run!r} has a job that has not ended. Got {submitted}, {state}. Fix: "
                f"follow it with `ray job logs --follow {submitted}`, stop it with `ray job stop "
                f"{submitted}`, or give another --run"
            )
    return base if not own else f"{base}-try{len(own) + 1}"


def _jobs(address: str | None) -> list[tuple[str, str]]:
    from bridgework.ray_utils import jobs

    named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not named:
        raise ResourceError(
            "submit: no cluster is named. Fix: export RAY_API_SERVER_ADDRESS=http://localhost:8265 "
            "after `ray dashboard cluster.yaml`, or give --address"
        )
    return jobs(named)


def _named(env: list[str] | None) -> list[str]:
    """Return the names of variables. Raises SpecError for a value, which Ray would show."""
    for name in env or ():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise SpecError(
                f"--env: not the name of a variable. Got {name.partition('=')[0]!r} with more; "
                "expected NAME alone, because Ray shows the values of a job to everybody who sees "
                "the dashboard. Fix: set the value on the cluster's nodes"
            )
    return list(env or ())


def _runtime_env(folder: Path, named: list[str], install: bool) -> dict[str, Any]:
    """Return Ray's runtime_env: what is uploaded, and the environment of the job."""
    if not folder.is_dir():
        raise SpecError(f"--working-dir: not a folder. Got {str(folder)!r}")
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
    if (folder / "platform" / "bridgework").is_dir():
        variables["PYTHONPATH"] = "platform"  # the uploaded package, before an installed one
    if named:
        variables[NEEDS] = ",".join(named)
    found: dict[str, Any] = {"excludes": list(EXCLUDES), "env_vars": variables}
    if install:
        found["pip"] = _dependencies(folder / "pyproject.toml")
    return found


def _dependencies(file: Path) -> list[str]:
    try:
        project = tomllib.loads(file.read_text())["project"]
        return [str(requirement) for requirement in project.get("dependencies", [])]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise SpecError(
            f"--install: {file} cannot be read. Got {type(error).__name__}: {error}; expected a "
            "[project] with dependencies"
        ) from None


def _entrypoint(folder: Path, words: list[str]) -> list[str]:
    """Return `jobs.NAME ARGUMENTS` if the folder has this job, else `bridgework.cli WORDS`."""
    verb, rest = (
        ("import_hf", words[2:]) if words[:2] == ["import", "hf"] else (words[0], words[1:])
    )
    if (folder / "jobs" / f"{verb}.py").is_file():
        return [f"jobs.{verb}", *rest]
    return ["bridgework.cli", *words]


def check_env() -> None:
    """Raise ResourceError if the environment of a job lacks a variable that its submission names."""
    names = [name for name in os.environ.get(NEEDS, "").split(",") if name]
    if missing := [name for name in names if name not in os.environ]:
        raise ResourceError(
            f"{missing[0]}: the variable is not set in the environment of this job"
            f"{suggest(missing[0], [n for n in os.environ if n[:2] == missing[0][:2]])}. Fix: set it "
            "on the cluster's nodes before `ray start`, e.g. as a secret"
        )
