"""Imports point down, and a heavy library enters by the one door that is named for it."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests.house import source

DOORS = {
    "ray": (
        "ray_metrics.py",
        "ray_utils.py",
        "data/ray_ingest.py",
        "training/ray_evaluation.py",
        "training/ray_train.py",
        "training/process_group.py",
        "tuning/",
        "serving/",
    ),
    "deepspeed": ("training/deepspeed_backend.py",),
    "mlflow": ("tracking/mlflow_store.py", "tracking/mlflow_tables.py"),
}
STRANGERS = {  # of the same layer, and yet they may not know each other
    "models": ("data",),
    "data": ("models",),
    "losses": ("models", "data"),
    "recipes": ("training", "tracking", "hf"),  # a recipe is specs
}


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    for line, module in source.imports(path):
        if module.split(".")[0] == "bridgework":
            yield line, source.part(module)


def test_every_part_of_the_package_has_a_layer() -> None:
    known = {name for parts in source.LAYERS for name in parts}
    assert {source.part_of(path) for path in source.package()} <= known


def test_imports_point_down() -> None:
    upward = [
        f"{source.name(path)}:{line} imports {there}, which lies above {here}"
        for path in source.package()
        for here in [source.part_of(path)]
        for line, there in own_imports(path)
        if source.layer(there) > source.layer(here)
    ]
    assert not upward, "\n".join(upward)


def test_siblings_stay_strangers() -> None:
    met = [
        f"{source.name(path)}:{line} imports {there}"
        for path in source.package()
        for line, there in own_imports(path)
        if there in STRANGERS.get(source.part_of(path), ())
    ]
    assert not met, "\n".join(met)


FILES = {"fsspec", "filelock", "pyarrow", "tenacity", "upath"}  # only in storage


def test_the_lowest_layer_needs_the_standard_library_and_file_systems_alone() -> None:
    heavy = [
        f"{source.name(path)}:{line} imports {module}"
        for path in source.package()
        if source.layer(source.part_of(path)) == 0
        for line, module in source.imports(path)
        if module.split(".")[0] not in sys.stdlib_module_names | {"bridgework"}
        and not (module.split(".")[0] in FILES and source.part_of(path) == "storage")
    ]
    assert not heavy, "\n".join(heavy)


def test_what_ray_opens_beside_readers_and_workers_brings_no_torch() -> None:
    opened = "bridgework.data.ray_ingest, bridgework.training.ray_train"
    told = "sorted({'torch', 'transformers', 'deepspeed', 'mlflow'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, {opened}; print({told})"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_enters_by_its_door(library: str) -> None:
    elsewhere = [
        f"{source.name(path)}:{line} imports {module}"
        for path in source.package()
        for line, module in chain(source.imports(path), source.imports_by_string(path))
        if module.split(".")[0] == library
        if not path.relative_to(source.PACKAGE).as_posix().startswith(DOORS[library])
    ]
    assert not elsewhere, "\n".join(elsewhere)
