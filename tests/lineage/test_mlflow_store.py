"""The MLflow tracker, read back with MLflow's own client."""

import json
import multiprocessing
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bridgework.errors import TrackingError
from bridgework.mixture import DatasetInput
from bridgework.tracking import mlflow_tables
from bridgework.tracking.lineage import Reader
from bridgework.tracking.mlflow_store import MLflowReader, MLflowTracker, group
from bridgework.tracking.tracker import Point, Tracker


@pytest.fixture
def client(mlflow_tracker: MLflowTracker) -> MlflowClient:
    return MlflowClient(mlflow_tracker.uri, registry_uri=mlflow_tracker.uri)


def test_tracker_has_both_protocols(mlflow_tracker: MLflowTracker) -> None:
    tracker: Tracker = mlflow_tracker
    reader: Reader = mlflow_tracker
    assert tracker is reader


def test_store_is_under_home(
    store: Path, mlflow_tracker: MLflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = mlflow_tracker.start("align")
    mlflow_tracker.params(run, {"long": "x" * 10_000})
    assert (store / "mlflow.db").is_file()
    assert len(list((store / "mlartifacts").rglob(f"{run}/artifacts/params.json"))) == 1
    assert list(tmp_path.iterdir()) == []


def test_environment_sets_the_default_store(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    assert MLflowReader(None, tmp_path).uri == f"sqlite:///{store}/mlflow.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert MLflowReader(None, store).uri == f"sqlite:///{store}/mlflow.db"


def test_stage_is_nested_under_its_system(
    mlflow_tracker: MLflowTracker, client: MlflowClient
) -> None:
    system = mlflow_tracker.start("llava", tags={"git_commit": "abc"})
    stage = mlflow_tracker.start("align", parent=system, tags={"stage": "align"})
    parent = client.get_parent_run(stage)
    assert parent is not None
    assert parent.info.run_id == system
    assert [r.id for r in mlflow_tracker.children(system)] == [stage]


def test_resumed_run_is_running(mlflow_tracker: MLflowTracker, client: MlflowClient) -> None:
    run = mlflow_tracker.start("align", tags={"run_key": "k"})
    mlflow_tracker.finish(run, "KILLED")
    assert client.get_run(run).info.status == "KILLED"
    mlflow_tracker.start("align", tags={"run_key": "k"})
    assert client.get_run(run).info.status == "RUNNING"


def test_parameters_beyond_mlflow_limits_are_complete_in_a_file(
    mlflow_tracker: MLflowTracker, client: MlflowClient, tmp_path: Path
) -> None:
    values = {f"stages.{i}.optim.peak_lr": i * 1e-5 for i in range(250)} | {
        "trains.bridge.*": 1.0,
        "long": "x" * 9_000,
    }
    run = mlflow_tracker.start("align")
    mlflow_tracker.params(run, values)
    kept = client.get_run(run).data.params
    assert len(kept) == 252
    assert kept["stages.7.optim.peak_lr"] == str(7 * 1e-5)
    assert len(kept["long"]) < 9_000
    whole = json.loads(
        Path(client.download_artifacts(run, "params.json", str(tmp_path))).read_text()
    )
    assert whole == {k: str(v) for k, v in values.items()}


def test_short_parameters_need_no_file(mlflow_tracker: MLflowTracker, client: MlflowClient) -> None:
    run = mlflow_tracker.start("align")
    mlflow_tracker.params(run, {"optim.peak_lr": 1e-3})
    assert client.list_artifacts(run) == []


def test_datasets_round_trip(mlflow_tracker: MLflowTracker) -> None:
    given = (
        DatasetInput("blip558k", "a" * 64, "/data/blip558k", 558_128),
        DatasetInput("web", "b" * 64, "s3://bucket/web", 12_000_000),
    )
    run = mlflow_tracker.start("align")
    mlflow_tracker.inputs(run, given)
    assert set(mlflow_tracker.run(run).inputs) == set(given)


def test_points_posted_twice_are_stored_once(
    mlflow_tracker: MLflowTracker, client: MlflowClient
) -> None:
    points = [
        Point("loss", float("nan") if s == 7 else 1 / s, s, 1_700_000_000_000 + s)
        for s in range(1, 2_501)
    ]
    run = mlflow_tracker.start("align")
    mlflow_tracker.points(run, points)
    mlflow_tracker.points(run, points[:1_500])
    assert [m.step for m in client.get_metric_history(run, "train/loss")] == [
        p.step for p in points
    ]


def test_weights_are_referred_to_and_not_copied(
    store: Path, mlflow_tracker: MLflowTracker, client: MlflowClient, tmp_path: Path
) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"0" * 1_000_000)
    run = mlflow_tracker.start("align")
    model = mlflow_tracker.output(run, "llava/align", str(tmp_path), {"digest": "w" * 64})
    assert client.get_logged_model(model).status == "READY"
    assert client.get_logged_model(model).tags == {"artifact": str(tmp_path), "digest": "w" * 64}
    assert not list(store.rglob("weights.safetensors"))
    assert mlflow_tracker.output(run, "llava/align", str(tmp_path), {"digest": "w" * 64}) == model
    assert [m.id for m in mlflow_tracker.producers("w" * 64)] == [run]


def test_version_refers_to_its_logged_model(
    mlflow_tracker: MLflowTracker, client: MlflowClient
) -> None:
    run = mlflow_tracker.start("align")
    model = mlflow_tracker.output(run, "llava-align", "/runs/align", {"digest": "w" * 64})
    version = mlflow_tracker.register(
        "store-llava", model, run, "/runs/align", {"digest": "w" * 64, "loss": "2.5"}
    )
    kept = client.get_model_version("store-llava", version.version)
    assert '"store-llava"' in client.get_logged_model(model).tags["mlflow.modelVersions"]
    assert kept.source == client.get_logged_model(model).artifact_location
    assert kept.tags == {"artifact": "/runs/align", "digest": "w" * 64, "loss": "2.5"}
    assert mlflow_tracker.registered([run]) == [version]


def test_runs_that_start_from_many_weights_come_oldest_first(
    mlflow_tracker: MLflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tables, "VALUES", 2)  # so that they are several conditions
    digests = [f"{number:064x}" for number in range(5)]
    runs = [mlflow_tracker.start("later", tags={"starts_from_digest": d}) for d in digests]
    mlflow_tracker.start("other", tags={"starts_from_digest": "f" * 64})
    found = mlflow_tracker.started_from(digests)
    assert [run.id for run in found] == runs
    assert mlflow_tracker.started_from([]) == []
    models = [mlflow_tracker.output(run, "m", f"/runs/{run}", {"digest": run}) for run in runs]
    versions = [
        mlflow_tracker.register("many-llava", model, run, f"/runs/{run}", {"digest": run})
        for model, run in zip(models, runs, strict=True)
    ]
    assert mlflow_tracker.registered(runs) == versions
    outputs = [run.outputs[0] for run in mlflow_tracker.started_from(digests)]
    assert [(weights.name, weights.digest) for weights in outputs] == [("m", run) for run in runs]


def test_mlflow_error_is_one_line_with_the_request(
    mlflow_tracker: MLflowTracker,
) -> None:
    run = mlflow_tracker.start("align")
    mlflow_tracker.params(run, {"lr": 1})
    with pytest.raises(
        TrackingError,
        match=rf"^cannot log 1 parameters of run {run}: MLflow at sqlite.* reports: [^\n]*$",
    ):
        mlflow_tracker.params(run, {"lr": 2})
    with pytest.raises(TrackingError, match="cannot finish run nope"):
        mlflow_tracker.finish("nope")
    with pytest.raises(TrackingError, match="cannot keep the file"):
        mlflow_tracker.file(run, Path("/nowhere/at/all"))


def test_dead_server_is_reported_in_time_without_its_password(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(
            ("127.0.0.1", 0)
        )  # bound, not listening: connections are refused, and the port stays reserved
        uri = f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            TrackingError, match=r"http://me:\*\*\*@127.* does not answer\. Fix: start the server"
        ) as raised:
            MLflowTracker(uri, tmp_path, "p")
    assert "secret" not in str(raised.value)


def _open(home: Path) -> None:
    MLflowTracker(f"sqlite:///{home}/mlflow.db", home, "shared").start("align")


@pytest.mark.slow
def test_concurrent_drivers_share_one_valid_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    drivers = [context.Process(target=_open, args=(tmp_path,)) for _ in range(3)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert [d.exitcode for d in drivers] == [0, 0, 0]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("shared")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 3


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("loss", "train"),
        ("loss.contrastive.coco", "train"),
        ("grad_norm", "train"),
        ("samples.coco", "data"),
        ("replaced", "data"),
        ("heldout.loss", "eval"),
        ("ranking.accuracy", "eval"),
    ],
)
def test_metrics_are_grouped_in_the_ui(key: str, name: str) -> None:
    assert group(key) == name
