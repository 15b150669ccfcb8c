"""`bridgework doctor`: checks of the machine and of the installed versions.

A check never raises; an unknown value is its result. The version floors are security floors: every
lower version has a published vulnerability (SECURITY.md).
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
from uuid import uuid4

from packaging.specifiers import SpecifierSet

from bridgework import storage
from bridgework.storage import node_cache

FLOORS = {
    "ray": ">=2.60",  # token authentication of every entry point
    "mlflow": ">=3.17",
    "pillow": ">=12.3",
    "torch": ">=2.10",
    "transformers": ">5.2.0",
}
PYTHON = (3, 11)
MEMORY_GIB = 4.0  # the tiny systems with Ray, its workers and MLflow
DISK_GIB = 10.0  # converted weights of the packages, a few checkpoints, Ray's spilled objects


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    found: str
    advice: str = ""  # the fix of a failed check


def checks(home: Path) -> list[Check]:
    """Run all checks, in the order of the report. `home` is the folder of runs and datasets."""
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
    """Check that the source root platform/ does not shadow Python's module of that name.

    With an __init__.py it would, in Ray's workers.
    """
    shadow = Path(__file__).resolve().parents[2] / "__init__.py"
    own = Path(platform.__file__).resolve().parent == Path(sysconfig.get_path("stdlib")).resolve()
    return _check(
        "import platform",
        own and not shadow.exists(),
        str(shadow) if shadow.exists() else platform.__file__,
        f"delete {shadow if shadow.exists() else platform.__file__}: it shadows Python's module "
        "`platform`",
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
    """Return the memory of the machine, or the container's limit if that is lower."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(machine, int(text)) if text.isdigit() else machine


def _disk(home: Path) -> Check:
    local = storage.is_local(home)
    place = home if local else node_cache.root()
    free = shutil.disk_usage(_existing(place)).free / 2**30
    variable = "BRIDGEWORK_HOME" if local else "BRIDGEWORK_CACHE"
    return _check(
        "disk",
        free >= DISK_GIB,
        f"{free:.1f} GiB free at {place}",
        f"free {DISK_GIB:g} GiB, or set {variable} to a folder on another disk",
    )


def _writable(home: Path) -> Check:
    if not storage.is_local(home):
        return _reachable(home)
    folder = _existing(home)
    try:
        with tempfile.TemporaryFile(dir=folder):  # os.access is True for root on a read-only disk
            return Check("home", True, str(home))
    except OSError as error:
        return Check(
            "home",
            False,
            f"{home}: {error.strerror}",
            "set BRIDGEWORK_HOME to a folder that you can write to",
        )


def _reachable(home: Path) -> Check:
    """Write, list, read and remove an object in the store of the home."""
    probe = home / f".probe-{uuid4().hex[:8]}"
    try:
        storage.write_atomic(probe, probe.name)
        listed = probe.name in storage.names(home) and probe.read_text() == probe.name
        probe.unlink()
    except OSError as error:
        what, _, fix = str(error).partition(" Fix: ")
        return Check("home", False, what, fix)
    return _check(
        "home",
        listed,
        f"{home}: written and read" if listed else f"{home}: a new object is not listed yet",
        "use a store with strong consistency, because a run would resume from an older checkpoint",
    )


def _existing(path: Path) -> Path:
    """Return the path or its nearest existing parent."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def _accelerator() -> Check:
    """Report the GPUs; passes without one, because the tiny systems run on a CPU."""
    if util.find_spec("torch") is None:
        return Check("gpu", True, "unknown without torch")
    import torch  # takes three seconds

    if not torch.cuda.is_available():
        return Check(
            "gpu",
            True,
            f"none that torch {torch.__version__} can use: training runs on the CPU, in fp32",
        )
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("gpu", True, ", ".join(names))


def _authentication() -> Check:
    """Check RAY_AUTH_MODE, which `ray start` needs; a Ray that bridgework starts is on loopback."""
    mode = os.environ.get("RAY_AUTH_MODE")
    advice = (
        "run `export RAY_AUTH_MODE=token` before `ray start`, because without it everyone who "
        "reaches a cluster's ports can run code"
    )
    if mode is None:
        return Check(
            "RAY_AUTH_MODE",
            True,
            "not set: a Ray that bridgework starts is on loopback only and needs no token",
            advice,
        )
    return _check("RAY_AUTH_MODE", mode.lower() == "token", mode, advice)
