"""The image: its Dockerfile passes a linter, and what it copies and installs is there."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.house import source

DOCKERFILE = source.ROOT / "deploy/Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")
IGNORE = (source.ROOT / "deploy/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
BIN = Path(sys.executable).parent


def copied() -> list[str]:
    """Files and folders of the repository that the Dockerfile copies."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", TEXT, re.MULTILINE)
    return [word for line in lines for word in line.split()[:-1]]


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_that_is_copied_exists_and_nothing_else_enters_the_build() -> None:
    allowed = [line[1:] for line in IGNORE if line.startswith("!")]
    assert IGNORE[next(i for i, line in enumerate(IGNORE) if not line.startswith("#"))] == "*"
    assert sorted(allowed) == sorted(copied())
    assert all((source.ROOT / name).exists() for name in copied())


def test_no_user_is_root_and_no_argument_holds_a_secret() -> None:
    users = re.findall(r"^USER (\S+)", TEXT, re.MULTILINE)
    assert users == ["10001:10001"]
    named = re.findall(r"^(?:ARG|ENV) (.+)", TEXT, re.MULTILINE)
    secret = re.compile("(?i)token|secret|password|credential|_key")
    assert not [line for line in named if secret.search(line)]


def test_the_user_is_that_of_the_manifests() -> None:
    manifests = "".join(
        path.read_text(encoding="utf-8")
        for path in source.files()
        if path.is_relative_to(source.ROOT / "deploy/kuberay") and path.suffix == ".yaml"
    )
    assert set(re.findall(r"runAsUser: (\d+)", manifests)) == {"10001"}


@pytest.mark.slow
def test_the_install_steps_of_the_image_run_in_an_empty_folder(tmp_path: Path) -> None:
    """Without the image's base: the Makefile, with the files and the extras of the Dockerfile."""
    built = TEXT.split("\nFROM ")[1]  # the first stage
    names = [
        w for line in re.findall(r"^COPY (.+)$", built, re.MULTILINE) for w in line.split()[:-1]
    ]
    skipped = [line.removeprefix("**/") for line in IGNORE if line.startswith("**/")]

    def ignored(folder: str, entries: list[str]) -> set[str]:
        return {entry for entry in entries if any(fnmatch(entry, pattern) for pattern in skipped)}

    for name in names:
        path = source.ROOT / name
        if path.is_dir():
            shutil.copytree(path, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(path, tmp_path / name)
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", built, re.MULTILINE)
    assert 'make setup PYTHON="$(command -v python3)" EXTRAS="${EXTRAS}"' in built
    command = ["make", "setup", f"PYTHON={sys.executable}", f"EXTRAS={extras}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3_000:]
    for command in (["bridgework", "systems"], ["ray", "--version"], ["mlflow", "--version"]):
        program, *words = command
        done = subprocess.run(
            [tmp_path / ".venv/bin" / program, *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3_000:]
