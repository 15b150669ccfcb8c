"""Contract of a Tracker, for the one in memory and for MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from bridgework.errors import TrackingError
from bridgework.mixture import DatasetInput
from bridgework.tracking.mlflow_store import MLflowTracker
from bridgework.tracking.tracker import MemoryTracker, Point, Tracker, Version


def registered(tracker: Tracker, name: str, artifact: str, **tags: str) -> Version:
    run = tracker.start("train")
    model = tracker.output(run, "llava-align", artifact, {"digest": uuid4().hex})
    return tracker.register(name, model, run, artifact, tags)


@pytest.fixture
def name() -> str:
    """Name of a registered model, unique because all projects of a store share these names."""
    return f"llava-{uuid4().hex[:8]}"


def test_run_with_same_key_is_resumed(tracker: Tracker) -> None:
    run = tracker.start("align", tags={"run_key": "monday/align"})
    tracker.finish(run, "FAILED")
    assert tracker.start("align", tags={"run_key": "monday/align"}) == run


def test_runs_that_differ_in_name_parent_or_key_are_different(tracker: Tracker) -> None:
    tags = {"run_key": "monday"}
    parent = tracker.start("llava", tags=tags)
    ids = [
        parent,
        tracker.start("align", parent=parent, tags=tags),
        tracker.start("instruct", parent=parent, tags=tags),
        tracker.start("llava", tags={"run_key": "tuesday"}),
    ]
    assert len(set(ids)) == 4
    assert tracker.start("align", parent=parent, tags=tags) == ids[1]


def test_runs_without_key_are_always_new(tracker: Tracker) -> None:
    assert tracker.start("align") != tracker.start("align")


def test_a_parameter_keeps_its_first_value_and_another_one_is_a_tag(tracker: Tracker) -> None:
    """An option, e.g. the size of a micro-batch, may change when a run resumes."""
    run = tracker.start("align")
    tracker.params(run, {"budget.micro": 8, "optim.peak_lr": 1e-3}, resumed=True)
    tracker.params(run, {"budget.micro": 2, "optim.peak_lr": 1e-3, "seed": 0}, resumed=True)
    if isinstance(tracker, MemoryTracker):
        params, tags = (
            {k: str(v) for k, v in tracker.runs[run].params.items()},
            tracker.runs[run].tags,
        )
    else:
        data = MlflowClient(tracker.uri).get_run(run).data
        params, tags = data.params, data.tags
    assert params == {"budget.micro": "8", "optim.peak_lr": "0.001", "seed": "0"}
    assert {k: v for k, v in tags.items() if k.startswith("now.")} == {"now.budget.micro": "2"}


def test_a_resumed_stage_reports_everything_again_into_the_same_run(
    tracker: Tracker, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text("{}")
    run = tracker.start("align", tags={"stage": "align", "starts_from_digest": ""})
    for _ in range(2):  # a stage that resumes logs all of it again
        tracker.params(run, {"optim.peak_lr": 1e-3, "losses": ["captioning"], "starts_from": None})
        tracker.inputs(run, [DatasetInput("blip558k", "d" * 64, "/data/blip558k", 558_128)])
        tracker.points(
            run,
            [
                Point("loss", 2.5, 1, 1_700_000_000_000),
                Point("loss", float("nan"), 2, 1_700_000_000_001),
            ],
        )
        tracker.file(run, recipe, "evals")
        tracker.output(run, "llava-align", "/runs/align", {"digest": "w" * 64})
        tracker.finish(run)
    seen = look(tracker, run)
    assert seen.status == "FINISHED"
    assert [(d.name, d.rows) for d in seen.inputs] == [("blip558k", 558_128)]  # once
    assert seen.last["loss"] != seen.last["loss"]  # the point of step 2, which is not a number
    assert seen.params["optim.peak_lr"] == "0.001"
    assert seen.outputs >= {"/runs/align"}


@dataclass(frozen=True)
class Seen:
    """Return a run as stored by either tracker."""

    status: str
    inputs: Sequence[DatasetInput]
    last: Mapping[str, float]  # the last value of each metric
    params: Mapping[str, str]
    outputs: set[str]  # folders of logged models


def look(tracker: Tracker, run: str) -> Seen:
    if isinstance(tracker, MemoryTracker):
        kept = tracker.runs[run]
        folders = {folder for of_run, _, folder, _ in tracker.models.values() if of_run == run}
        last = {point.key: point.value for point in kept.points}
        return Seen(
            kept.status, kept.inputs, last, {k: str(v) for k, v in kept.params.items()}, folders
        )
    assert isinstance(tracker, MLflowTracker)
    view = tracker.run(run)
    params = tracker._client.get_run(run).data.params
    return Seen(view.status, view.inputs, view.metrics, params, {w.artifact for w in view.outputs})


def test_versions_count_from_one(tracker: Tracker, name: str) -> None:
    versions = [registered(tracker, name, f"/runs/{i}", loss="2.5") for i in range(2)]
    assert [v.version for v in versions] == ["1", "2"]
    assert tracker.version(name, "2").artifact == "/runs/1"
    assert tracker.version(name, "2").tags["loss"] == "2.5"
    assert tracker.version(name, "2").run_id == versions[1].run_id


def test_alias_moves_to_its_new_version(tracker: Tracker, name: str) -> None:
    for i in range(2):
        registered(tracker, name, f"/runs/{i}")
    tracker.alias(name, "champion", "1")
    assert tracker.version(name, "champion").version == "1"
    tracker.alias(name, "champion", "2")
    assert tracker.version(name, "champion").version == "2"
    assert tracker.version(name, "1").aliases == ()
    assert tracker.version(name, "2").aliases == ("champion",)


def test_unknown_names_are_rejected_with_a_suggestion(tracker: Tracker, name: str) -> None:
    registered(tracker, name, "/runs/0")
    tracker.alias(name, "champion", "1")
    with pytest.raises(TrackingError, match=f"did you mean '{name}'"):
        tracker.version(name[:-1], "1")
    with pytest.raises(TrackingError, match="did you mean 'champion'"):
        tracker.version(name, "champoin")
    with pytest.raises(TrackingError, match="no version or alias '7'"):
        tracker.alias(name, "champion", "7")
