"""Environment of a run as tags: commit, command, versions of the packages, hardware, Ray job."""

import os
import platform as machine
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("bridgework", "torch", "ray", "deepspeed", "transformers", "mlflow", "pyarrow")
MAX_CHARS = 500  # of a tag
SECRET = re.compile(r"(?i)((?:key|token|secret|password)[\w-]*[= ]|://[^/:@\s]*:)[^\s@]+")


def tags() -> dict[str, str]:
    """Return the tags of a run that this process starts; empty values are left out."""
    commit, dirty = _commit()
    found = {
        "git_commit": commit,
        "git_dirty": dirty,
        "command": command(),
        "versions": versions(),
        "hardware": hardware(),
        "ray_job_id": os.environ.get("RAY_JOB_SUBMISSION_ID", ""),
    }
    return {name: value[:MAX_CHARS] for name, value in found.items() if value}


def command() -> str:
    """Return the command of this process, with the values of secrets replaced by dots."""
    _, *arguments = sys.orig_argv
    if arguments and not arguments[0].startswith("-"):
        words = [Path(arguments[0]).name, *arguments[1:]]  # a script, e.g. bin/bridgework
    else:
        words = ["python", *arguments]
    return SECRET.sub(r"\1...", shlex.join(words))


@cache
def versions() -> str:
    """Return Python's version and those of the packages that decide a result."""
    found = [f"python {machine.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


@cache
def hardware() -> str:
    """Return the GPUs or CPUs of this machine, e.g. "8 x NVIDIA H100 80GB HBM3"."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} x {_cpu()}"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else machine.machine()


@cache
def _commit() -> tuple[str, str]:
    """Return the git commit of the code, and "true" if files differ from it.

    Both are empty outside a repository.
    """
    folder = str(Path(__file__).parent)
    options = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            ["git", "-C", folder, *options], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "", ""
    commit, dirty, _ = done.stdout.strip().partition("-dirty")
    return commit, "true" if dirty else "false"
