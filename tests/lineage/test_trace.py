"""Lineage trees in both directions, on a real store and real datasets."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from rich.console import Console
from rich.tree import Tree

from bridgework.data.dataset import write
from bridgework.data.synthetic import shapes
from bridgework.errors import TrackingError
from bridgework.mixture import DatasetInput
from bridgework.tracking.lineage import trace, uses
from bridgework.tracking.mlflow_store import MLflowTracker
from bridgework.tracking.tracker import Point, Version


@dataclass(frozen=True)
class Story:
    """Captions are cleaned and read by `align`; `instruct` starts from its weights and is served."""

    home: Path
    tracker: MLflowTracker
    raw: DatasetInput
    clean: DatasetInput
    system: str
    align: str
    instruct: str
    version: Version
    answer: str


def text(tree: Tree) -> str:
    page = io.StringIO()
    Console(file=page, width=400).print(tree)
    return page.getvalue()


def assert_in_order(way: list[str], shown: str) -> None:
    place = 0
    for step in way:
        place = shown.find(step, place)
        assert place >= 0, f"{step!r} is missing, or too early, in\n{shown}"


def dataset(home: Path, name: str, seed: int, **about: object) -> DatasetInput:
    path = home / "datasets" / name
    written = {
        "source": "https://example.org/cc3m",
        "license": "CC-BY-4.0",
        "made_by": "import_pairs",
    } | about
    manifest = write(shapes(rows=8, seed=seed), str(path), **written)
    return DatasetInput(name, manifest.digest, str(path), manifest.rows)


@pytest.fixture
def story(mlflow_tracker: MLflowTracker, tmp_path: Path) -> Story:
    tracker, seed = (
        mlflow_tracker,
        uuid4().int % 2**31,
    )  # digests are new in each test: all share one store
    raw = dataset(tmp_path, "raw", seed)
    clean = dataset(
        tmp_path,
        "clean",
        seed + 1,
        made_by="capfilt",
        parameters={"keep": 0.5},
        parents=[raw.digest],
    )
    chats = dataset(tmp_path, "chats", seed + 2, license="CC0-1.0")
    first, second = uuid4().hex * 2, uuid4().hex * 2
    about = {"system": "llava", "fingerprint": "f1f2f3f4f5f6", "git_commit": "0a1b2c3d4e5f"}

    system = tracker.start("monday", tags=about | {"run_key": "monday"})
    align = tracker.start(
        "align", parent=system, tags=about | {"stage": "align", "starts_from_digest": ""}
    )
    tracker.inputs(align, [clean])
    tracker.points(align, [Point("loss", 2.5, 10, 1_700_000_000_000)])
    tracker.output(align, "llava-align", "/runs/monday/align/artifact", {"digest": first})
    instruct = tracker.start(
        "instruct", parent=system, tags=about | {"stage": "instruct", "starts_from_digest": first}
    )
    tracker.inputs(instruct, [chats])
    model = tracker.output(
        instruct, "llava-instruct", "/runs/monday/instruct/artifact", {"digest": second}
    )
    for run in (align, instruct, system):
        tracker.finish(run)
    name = f"llava-{uuid4().hex[:6]}"
    version = tracker.register(
        name, model, instruct, "/runs/monday/instruct/artifact", {"digest": second}
    )
    tracker.alias(name, "champion", version.version)

    deployment = uuid4().hex[:12]
    serve(tmp_path, deployment, name, version.version, version.artifact, second)
    return Story(
        tmp_path,
        tracker,
        raw,
        clean,
        system,
        align,
        instruct,
        version,
        f"chatcmpl-{deployment}-{uuid4().hex[:12]}",
    )


def serve(
    home: Path, deployment: str, model: str, version: str, artifact: str, digest: str
) -> None:
    words = {
        "id": deployment,
        "app": "chat",
        "model": model,
        "version": version,
        "artifact": artifact,
    }
    words |= {"digest": digest, "started": "2026-11-22T10:00:00+00:00"}
    (home / "deployments").mkdir(exist_ok=True)
    (home / "deployments" / f"{deployment}.json").write_text(json.dumps(words))


def test_answer_is_traced_to_its_shards(story: Story) -> None:
    shown = text(trace(story.answer, story.tracker, story.home))
    way = [
        f"response {story.answer}",
        "deployment ",
        f"model {story.version.name} version 1  champion",
        f"weights {story.version.tags['digest'][:12]}  /runs/monday/instruct/artifact",
        f"stage instruct of llava {story.instruct}  finished",
        "recipe f1f2f3f4f5f6",
        "git commit 0a1b2c3d4e5f",
        "dataset chats",
        "license CC0-1.0",
        f"stage align of llava {story.align}",
        "metrics loss 2.5",
        f"dataset clean {story.clean.digest[:12]}  8 rows",
        "made by capfilt(keep=0.5)",
        f"dataset raw {story.raw.digest[:12]}",
        "source https://example.org/cc3m",
        f"shards 1 with 0.0 MB, in {story.home}/datasets/raw",
    ]
    assert_in_order(way, shown)


@pytest.mark.parametrize("asked", ["{id}", "{model}", "{model}@champion", "{model}:1", "{run}"])
def test_every_name_of_a_model_is_traced_to_the_same_datasets(asked: str, story: Story) -> None:
    deployment = story.answer.split("-")[1]
    what = asked.format(id=deployment, model=story.version.name, run=story.instruct)
    shown = text(trace(what, story.tracker, story.home))
    assert all(f"dataset {name}" in shown for name in ("chats", "clean", "raw"))


def test_run_of_a_system_shows_each_stage_once(story: Story) -> None:
    shown = text(trace(story.system, story.tracker, story.home))
    assert shown.index("run monday") < shown.index("stage align") < shown.index("stage instruct")
    assert shown.count("recipe f1f2f3f4f5f6") == 3
    assert f"stage align of llava {story.align}  see above" in shown


def test_dataset_is_traced_to_its_deployment(story: Story) -> None:
    for asked in ("raw", story.raw.digest, story.raw.digest[:8]):
        shown = text(uses(asked, story.tracker, story.home))
        way = [
            f"dataset raw {story.raw.digest[:12]}",
            f"dataset clean {story.clean.digest[:12]}",
            f"stage align of llava {story.align}",
            "/runs/monday/align/artifact",
            f"stage instruct of llava {story.instruct}",
            f"model {story.version.name} version 1  champion",
            f"deployment {story.answer.split('-')[1]}  chat",
        ]
        assert_in_order(way, shown)
        assert "dataset chats" not in shown


def test_dataset_that_was_deleted_is_still_traced(story: Story) -> None:
    for file in sorted((story.home / "datasets" / "clean").iterdir()):
        file.unlink()
    shown = text(trace(story.align, story.tracker, story.home))
    assert f"dataset clean {story.clean.digest[:12]}  8 rows" in shown
    assert f"manifest no longer at {story.clean.path}" in shown
    assert story.align in text(uses(story.clean.digest, story.tracker, story.home))


def test_weights_without_a_version_are_traced_by_their_digest(story: Story) -> None:
    digest = story.version.tags["digest"]
    serve(story.home, "byfolder", "artifact", "", "/elsewhere/artifact", digest)
    serve(story.home, "unknown", "artifact", "", "/elsewhere/other", "0" * 64)
    serve(story.home, "gone", story.version.name, "7", "/elsewhere/artifact", digest)
    shown = text(trace("byfolder", story.tracker, story.home))
    assert f"weights {digest[:12]}  /elsewhere/artifact" in shown
    assert f"stage instruct of llava {story.instruct}" in shown
    assert "no run of this store made these weights" in text(
        trace("unknown", story.tracker, story.home)
    )
    shown = text(trace("gone", story.tracker, story.home))
    assert "has no version or alias '7'" in shown
    assert f"stage instruct of llava {story.instruct}" in shown


def test_stage_whose_weights_did_not_change_is_traced_once(
    mlflow_tracker: MLflowTracker, tmp_path: Path
) -> None:
    digest = uuid4().hex * 2
    run = mlflow_tracker.start("align", tags={"stage": "align", "starts_from_digest": digest})
    mlflow_tracker.output(run, "llava-align", "/runs/align", {"digest": digest})
    assert text(trace(run, mlflow_tracker, tmp_path)).count(run) == 2


def test_unknown_names_are_rejected_with_a_suggestion(story: Story) -> None:
    with pytest.raises(TrackingError, match=f"did you mean '{story.version.name}'"):
        trace(story.version.name[:-1], story.tracker, story.home)
    with pytest.raises(TrackingError, match="there is no deployment 'nope'; known: "):
        trace("chatcmpl-nope-0123456789ab", story.tracker, story.home)
    with pytest.raises(TrackingError, match="did you mean 'clean'"):
        uses("claen", story.tracker, story.home)
    with pytest.raises(TrackingError, match="cannot read run 0000"):
        trace("0" * 32, story.tracker, story.home)


def test_dataset_that_only_a_run_knows_is_suggested(
    mlflow_tracker: MLflowTracker, tmp_path: Path
) -> None:
    run = mlflow_tracker.start("align")
    mlflow_tracker.inputs(run, [DatasetInput("far-away", "d" * 64, "s3://lab/far-away", 3)])
    with pytest.raises(TrackingError, match="did you mean 'far-away'"):
        uses("far-awya", mlflow_tracker, tmp_path)


def test_external_names_are_not_parsed_as_markup(
    mlflow_tracker: MLflowTracker, tmp_path: Path
) -> None:
    run = mlflow_tracker.start(
        "[bold]align[/nope]", tags={"stage": "align", "system": "[red]llava"}
    )
    assert "[bold]align[/nope] of [red]llava" in text(trace(run, mlflow_tracker, tmp_path))


def test_broken_record_of_a_deployment_is_reported(
    mlflow_tracker: MLflowTracker, tmp_path: Path
) -> None:
    (tmp_path / "deployments").mkdir()
    (tmp_path / "deployments" / "x.json").write_text("{}")
    with pytest.raises(TrackingError, match=r"x\.json is not a deployment"):
        trace("llava", mlflow_tracker, tmp_path)
