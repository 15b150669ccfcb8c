"""`bridgework doctor`: can this machine run bridgework, and is what it would run known to be safe?

A check never raises: what it could not find out is its answer. The version floors are security floors: below each of
them lies a published hole (SECURITY.md).
"""

import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from packaging.specifiers import SpecifierSet

FLOORS = {
    "ray": ">=2.60",  # token authentication of every entry point
    "mlflow": ">=3.17",
    "pillow": ">=12.3",
    "torch": ">=2.10",
    "transformers": ">5.2.0",
}
PYTHON = (3, 11)
MEMORY_GIB = 4.0  # the tiny systems with Ray, its workers and MLflow
DISK_GIB = 10.0  # the packages' weights converted once, a few checkpoints, Ray's object store when it spills


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; `advice` is what to do, empty where there is nothing."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def checks(home: Path) -> list[Check]:
    """Every check, in the order of the report. `home` is the folder that runs, datasets and MLflow write to."""
    return [
        _python(),
        *_versions(),
        _standard_platform(),
        _memory(),
        _disk(home),
        _writable(home),
        _accelerator(),
        _authentication(),
    ]


def _check(name: str, ok: bool, found: str, advice: str) -> Check:
    return Check(name, ok, found, "" if ok else advice)


def _python() -> Check:
    floor = ".".join(map(str, PYTHON))
    return _check(
        "python",
        sys.version_info >= PYTHON,
        platform.python_version(),
        f"use Python {floor} or newer: make PYTHON=/path/to/python{floor}",
    )


def _versions() -> Iterator[Check]:
    for package, floor in FLOORS.items():
        advice = f"install {package}{floor}: `make setup` takes the releases of constraints.txt"
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Check(package, False, "not installed", advice)
        else:
            yield _check(
                package, SpecifierSet(floor).contains(found, prereleases=True), found, advice
            )


def _standard_platform() -> Check:
    """The source root is called platform/: with an __init__.py it hides Python's own module from Ray's workers."""
    shadow = Path(__file__).resolve().parents[2] / "__init__.py"
    own = Path(platform.__file__).resolve().parent == Path(sysconfig.get_path("stdlib")).resolve()
    return _check(
        "import platform",
        own and not shadow.exists(),
        str(shadow) if shadow.exists() else platform.__file__,
        f"delete {shadow if shadow.exists() else platform.__file__}: it shadows Python's own module `platform`",
    )


def _memory() -> Check:
    found = _memory_bytes() / 2**30
    return _check(
        "memory",
        found >= MEMORY_GIB,
        f"{found:.1f} GiB",
        f"the tiny systems need about {MEMORY_GIB:g} GiB",
    )


def _memory_bytes() -> int:
    """What the machine has, or the container's limit where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(machine, int(text)) if text.isdigit() else machine


def _disk(home: Path) -> Check:
    free = shutil.disk_usage(_existing(home)).free / 2**30
    return _check(
        "disk",
        free >= DISK_GIB,
        f"{free:.1f} GiB free at {home}",
        f"free {DISK_GIB:g} GiB, or set BRIDGEWORK_HOME to a folder on another disk",
    )


def _writable(home: Path) -> Check:
    place = _existing(home)
    try:
        with tempfile.TemporaryFile(dir=place):  # os.access says yes to root on a read-only disk
            return Check("home", True, str(home))
    except OSError as error:
        return Check(
            "home",
            False,
            f"{home}: {error.strerror}",
            "set BRIDGEWORK_HOME to a folder that you can write to",
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def _accelerator() -> Check:
    """Passes either way: a machine without a GPU runs everything that is tiny."""
    if util.find_spec("torch") is None:
        return Check("gpu", True, "unknown without torch")
    import torch  # three seconds: only where the answer is wanted

    if not torch.cuda.is_available():
        return Check(
            "gpu",
            True,
            f"none that torch {torch.__version__} can use: training runs on the CPU, in fp32",
        )
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("gpu", True, ", ".join(names))


def _authentication() -> Check:
    """A Ray that bridgework starts itself listens on loopback without tokens; `ray start` needs the variable."""
    mode = os.environ.get("RAY_AUTH_MODE")
    advice = "run `export RAY_AUTH_MODE=token` before `ray start`: without it, whoever reaches a cluster's ports runs code"
    if mode is None:
        return Check(
            "RAY_AUTH_MODE",
            True,
            "not set: a Ray that bridgework starts is on loopback only, and asks for no token",
            advice,
        )
    return _check("RAY_AUTH_MODE", mode.lower() == "token", mode, advice)
