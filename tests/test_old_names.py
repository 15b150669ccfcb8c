"""Files that were written before a rename still load."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from bridgework import old_names
from bridgework.config import from_dict, to_dict
from bridgework.data.quarantine import Reason
from bridgework.system import load
from bridgework.training import run_dir


def as_written_before(value: object) -> object:
    """A recipe as an earlier version wrote it: old class names, old fields."""
    classes = {f"bridgework.{now}": f"bridgework.{then}" for then, now in old_names.CLASSES.items()}
    fields = {now: then for then, now in old_names.FIELDS.items()}
    if isinstance(value, dict):
        back = {fields.get(key, key): as_written_before(item) for key, item in value.items()}
        return back | {"_": classes.get(value["_"], value["_"])} if "_" in value else back
    return [as_written_before(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "name", ["clip", "blip", "blip2", "instructblip", "llava", "flamingo", "xgen_mm"]
)
def test_recipes_with_old_names_load_as_they_are_today(name: str) -> None:
    system = load(name)
    before = as_written_before(json.loads(json.dumps(to_dict(system))))
    assert "bridgework.losses.captioning:Captioning" in json.dumps(before) or name == "clip"
    assert '"shard"' in json.dumps(before)
    assert from_dict(before) == system


@pytest.mark.parametrize("now", sorted(old_names.CLASSES.values()))
def test_every_old_class_has_a_class_today(now: str) -> None:
    module, _, name = now.partition(":")
    assert isinstance(getattr(import_module(f"bridgework.{module}"), name), type)


def test_an_old_reason_of_quarantine_is_read() -> None:
    assert Reason("licence") is Reason.LICENSE


def test_the_folder_of_an_old_artifact_is_found(tmp_path: Path) -> None:
    assert run_dir.artifact_dir(tmp_path) == tmp_path / "artifact"
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "artifact.json").write_text("{}")
    assert run_dir.artifact_dir(tmp_path) == tmp_path / "artifact"
    assert run_dir.is_finished(tmp_path)
