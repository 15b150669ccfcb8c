"""Files that were written before a rename still load."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from bridgework import artifacts, old_names
from bridgework.config import from_dict, to_dict
from bridgework.data.collate import collate
from bridgework.data.quarantine import Reason
from bridgework.data.reader import ReaderConfig, local
from bridgework.system import load
from bridgework.training import run_dir
from bridgework.training.flight_recorder import FlightRecorder, read_step
from tests.training.support import llava

ALIGN = llava()["align"]


def as_written_before(value: object) -> object:
    """Return a recipe as an earlier version wrote it: old class names, old fields."""
    classes = {f"bridgework.{now}": f"bridgework.{then}" for then, now in old_names.CLASSES.items()}
    fields = {now: then for then, now in old_names.FIELDS.items()}
    if isinstance(value, dict):
        back = {fields.get(key, key): as_written_before(item) for key, item in value.items()}
        return back | {"_": classes.get(value["_"], value["_"])} if "_" in value else back
    return [as_written_before(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "name", ["clip", "blip", "blip2", "instructblip", "llava", "flamingo", "xgen_mm"]
)
def test_recipes_with_old_names_load_as_current_ones(name: str) -> None:
    system = load(name)
    before = as_written_before(json.loads(json.dumps(to_dict(system))))
    assert "bridgework.losses.captioning:Captioning" in json.dumps(before) or name == "clip"
    assert '"shard"' in json.dumps(before)
    assert from_dict(before) == system


@pytest.mark.parametrize("now", sorted(old_names.CLASSES.values()))
def test_every_old_class_has_a_current_class(now: str) -> None:
    module, _, name = now.partition(":")
    assert isinstance(getattr(import_module(f"bridgework.{module}"), name), type)


def test_an_old_reason_of_quarantine_is_read() -> None:
    assert Reason("licence") is Reason.LICENSE


def test_artifact_with_an_old_name_is_found(tmp_path: Path) -> None:
    assert run_dir.artifact_dir(tmp_path) == tmp_path / "artifact"
    (tmp_path / "artefact").mkdir()
    (tmp_path / "artefact" / "artefact.json").write_text("{}")
    assert run_dir.artifact_dir(tmp_path) == tmp_path / "artefact"
    assert run_dir.is_finished(tmp_path)
    assert artifacts.info_file(tmp_path / "artefact").name == "artefact.json"


def test_flight_recorder_with_an_old_name_is_read_and_continued(home: Path, tmp_path: Path) -> None:
    """New files sort after those of the old folder, for any clock."""
    batch = collate(next(local(ReaderConfig.of(ALIGN, home), rank=0, world=1, start=0)), pad_id=0)
    for number, attempt in enumerate(("old", "new")):
        with FlightRecorder(tmp_path, attempt, 0, start=0) as recorder:
            recorder.step(0, [batch], [float(number)] * 8, [1.0] * 8)
        assert {sample.loss for sample in read_step(tmp_path, 0)} == {float(number)}
        if attempt == "old":
            (tmp_path / "flight_recorder").rename(tmp_path / "flight")
            (file,) = (tmp_path / "flight").iterdir()
            file.rename(file.with_name(f"{'9' * 19}0-old-00000.arrows"))
            assert len(read_step(tmp_path, 0)) == 8
