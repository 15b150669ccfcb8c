"""Lineage trees in both directions, on a real store and real datasets."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from rich.console import Console

from bridgework.data.dataset import open_dataset, write
from bridgework.data.synthetic import shapes
from bridgework.errors import TrackingError
from bridgework.mixture import DatasetInput
from bridgework.tracking import environment
from bridgework.tracking.lineage import Lineage, trace, uses
from bridgework.tracking.lineage_views import page, to_json, tree
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


def text(graph: Lineage) -> str:
    page = io.StringIO()
    Console(file=page, width=400).print(tree(graph))
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


@pytest.mark.parametrize("name", ["monday", "{digest}", "{short}", "{folder}"])
def test_runs_weights_and_folders_are_traced(name: str, story: Story) -> None:
    digest = story.version.tags["digest"]
    folder = story.home / "own" / "artifact"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").touch()
    about = {
        "system": "llava",
        "stage": "instruct",
        "fingerprint": "f",
        "digest": digest,
        "parent": None,
        "datasets": [],
        "steps": 1,
        "tensors": 1,
        "parameters": 1,
        "created": 0.0,
        "version": "0.1.0",
    }
    (folder / "artifact.json").write_text(json.dumps(about))
    asked = name.format(digest=digest, short=digest[:12], folder=folder)
    shown = text(trace(asked, story.tracker, story.home))
    assert "stage instruct of llava" in shown and "dataset raw" in shown


def test_dataset_is_traced_to_its_parents(story: Story) -> None:
    for asked in ("clean", story.clean.digest[:10], story.clean.path):
        shown = text(trace(asked, story.tracker, story.home))
        assert_in_order(["dataset clean", "made by capfilt", "dataset raw"], shown)


def test_shards_and_samples_are_followed_to_the_deployment(story: Story) -> None:
    manifest = open_dataset(story.raw.path).manifest
    shard = manifest.shards[0]
    key = next(iter(open_dataset(story.raw.path).keys()))[3]
    for asked in (
        f"{story.raw.path}/{shard.file}",
        shard.sha256,
        f"raw/{key}",
        key,
    ):
        shown = text(uses(asked, story.tracker, story.home))
        assert all(f"dataset {name}" in shown for name in ("raw", "clean"))
        assert_in_order([f"stage align of llava {story.align}", "stage instruct"], shown)
        assert f"model {story.version.name}" in shown
        assert f"deployment {story.answer.split('-')[1]}" in shown
    with pytest.raises(TrackingError, match="neither a shard or sample"):
        uses("raw/no-such-key", story.tracker, story.home)


def test_models_and_runs_are_followed_to_the_deployment(story: Story) -> None:
    for asked in (f"{story.version.name}:1", story.instruct, story.version.tags["digest"]):
        shown = text(uses(asked, story.tracker, story.home))
        assert f"deployment {story.answer.split('-')[1]}" in shown
        assert "dataset" not in shown
    assert "stage align" in text(uses(story.system, story.tracker, story.home))


def test_trial_that_read_a_dataset_is_listed_without_a_version(story: Story) -> None:
    sweep = story.tracker.start("bridges")
    trial = story.tracker.start("trial-3", parent=sweep, tags={"stage": "align", "system": "llava"})
    story.tracker.inputs(trial, [story.clean])
    story.tracker.inputs(sweep, [story.clean])
    shown = text(uses("clean", story.tracker, story.home))
    assert f"stage trial-3 of llava {trial}" in shown and "run bridges" not in shown


def test_parent_is_the_recorded_run_even_if_others_made_equal_weights(
    mlflow_tracker: MLflowTracker, tmp_path: Path
) -> None:
    tracker, digest = mlflow_tracker, uuid4().hex * 2
    aligns, instructs = [], []
    for name in ("first", "second", "third"):
        system = tracker.start(name)
        align = tracker.start("align", parent=system, tags={"stage": "align"})
        tracker.output(align, "llava-align", f"/runs/{name}/align", {"digest": digest})
        about = {"stage": "instruct", "starts_from_digest": digest}
        if name == "second":  # as of runs of today; without it, the run of the same system
            about["starts_from_run"] = align
        aligns.append(align)
        instructs.append(tracker.start("instruct", parent=system, tags=about))
    for align, instruct in zip(aligns, instructs, strict=True):
        shown = text(trace(instruct, tracker, tmp_path))
        assert align in shown and not {*aligns} - {align} & {w for w in shown.split()}


def test_dataset_of_many_runs_is_described_once(story: Story) -> None:
    other = story.tracker.start("again", tags={"stage": "again", "starts_from_digest": ""})
    story.tracker.inputs(other, [story.clean])
    parent = story.tracker.start("pair")
    for number in range(2):
        run = story.tracker.start(f"s{number}", parent=parent, tags={"stage": "s"})
        story.tracker.inputs(run, [story.clean])
    shown = text(trace(parent, story.tracker, story.home))
    assert shown.count("made by capfilt") == 1
    assert shown.count("dataset clean") == 2 and "see above" in shown


def test_json_and_page_have_every_node_and_escape_names(story: Story) -> None:
    graph = trace(story.answer, story.tracker, story.home)
    data = json.loads(json.dumps(to_json(graph)))
    kinds = {node["kind"] for node in data["nodes"].values()}
    assert kinds == {"response", "deployment", "version", "weights", "run", "dataset"}
    assert {key for edge in data["edges"] for key in edge} <= data["nodes"].keys()
    html = page(graph)
    assert html.count("<article ") == len(data["nodes"]) == html.count("<rect ")
    assert html.count("<path ") == len(data["edges"])
    run = story.tracker.start("<script>alert(1)</script>", tags={"stage": "x"})
    assert "<script" not in page(trace(run, story.tracker, story.home))


def test_facts_of_the_environment_are_shown(mlflow_tracker: MLflowTracker, tmp_path: Path) -> None:
    run = mlflow_tracker.start("align", tags={"stage": "align", "seed": "7", **environment.tags()})
    shown = text(trace(run, mlflow_tracker, tmp_path))
    assert_in_order(
        ["command python", "git commit", "seed 7", "versions python 3", "hardware"], shown
    )


def test_secrets_of_a_command_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter2"
    monkeypatch.setattr(
        "sys.orig_argv",
        [
            "/bin/python",
            "/bin/bridgework",
            "x",
            f"api_key={secret}",
            f"--token={secret}",
            f"http://u:{secret}@h/x",
        ],
    )
    assert secret not in environment.command()
    assert environment.command().startswith("bridgework x")


def test_weights_of_a_copied_home_are_found_in_the_copy(
    mlflow_tracker: MLflowTracker, tmp_path: Path
) -> None:
    tracker = mlflow_tracker
    run = tracker.start("instruct")
    gone = "/no/such/home/runs/monday/instruct/artifact"
    model = tracker.output(run, "llava-instruct", gone, {"digest": "d"})
    name = f"copied-{uuid4().hex[:6]}"
    tracker.register(name, model, run, gone, {"digest": "d"})
    assert tracker.version(name, "1").artifact == gone
    folder = tmp_path / "runs" / "monday" / "instruct" / "artifact"
    folder.mkdir(parents=True)
    (folder / "artifact.json").touch()
    copy = MLflowTracker(tracker.uri, tmp_path, "bridgework")
    assert copy.version(name, "1").artifact == str(folder)
    assert copy.run(run).outputs[0].artifact == str(folder)
