"""OpenLineage events: each one can be read back by the client's own classes, and names what it should."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from uuid import UUID

import pytest
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState

from bridgework import api, override
from bridgework.curation.filters import Filters
from bridgework.data.synthetic import shapes
from bridgework.system import load
from bridgework.tracking import openlineage_events
from bridgework.tracking.mlflow_store import MLflowTracker
from bridgework.tracking.openlineage_events import Artifact, Event, emit
from bridgework.training.driver import train


@pytest.fixture(autouse=True)
def own_client() -> Iterator[None]:
    """A client by the settings of the test."""
    openlineage_events._client.cache_clear()
    yield
    openlineage_events._client.cache_clear()


def events(home: Path) -> list[dict[str, Any]]:
    lines = (home / openlineage_events.FILE).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for event in found:
        check(event)
    return found


def check(event: dict[str, Any]) -> None:
    """Build the event with the client's classes, which validate ids, times and URIs."""
    assert urlparse(event["schemaURL"]).path.startswith("/spec/2-")
    rebuilt = RunEvent(
        eventTime=event["eventTime"],
        eventType=RunState[event["eventType"]],
        run=Run(runId=event["run"]["runId"]),
        job=Job(namespace=event["job"]["namespace"], name=event["job"]["name"]),
        inputs=[InputDataset(namespace=d["namespace"], name=d["name"]) for d in event["inputs"]],
        outputs=[OutputDataset(namespace=d["namespace"], name=d["name"]) for d in event["outputs"]],
        producer=event["producer"],
    )
    assert UUID(rebuilt.run.runId)
    facets = [*event["run"]["facets"].values(), *event["job"]["facets"].values()]
    for data in (*event["inputs"], *event["outputs"]):
        facets += data["facets"].values()
    assert all(facet["_producer"] and facet["_schemaURL"] for facet in facets)


def test_import_and_curation_name_their_source_and_digest(tmp_path: Path) -> None:
    photos, home = tmp_path / "photos", tmp_path / "home"
    photos.mkdir()
    for number, sample in enumerate(shapes(3)):
        (photos / f"{number}.png").write_bytes(sample.images[0])
        (photos / f"{number}.txt").write_text(sample.text)
    first = api.import_dataset("folder", photos, "mine", license="CC0-1.0", home=home)
    second = api.curate(Filters(min_side=8), "mine", "large", home=home)
    imported, curated = events(home)
    assert imported["job"]["facets"]["jobType"]["jobType"] == "IMPORT"
    assert imported["inputs"][0]["name"] == str(photos)
    assert imported["outputs"][0]["name"] == str(home / "datasets" / "mine")
    assert imported["outputs"][0]["facets"]["version"]["datasetVersion"] == first.digest
    assert imported["outputs"][0]["outputFacets"]["outputStatistics"]["rowCount"] == 3
    assert curated["inputs"][0]["facets"]["version"]["datasetVersion"] == first.digest
    assert curated["outputs"][0]["facets"]["version"]["datasetVersion"] == second.digest


def test_stages_are_followed_from_start_to_end(
    home: Path, tmp_path: Path, mlflow_tracker: MLflowTracker
) -> None:
    system = override(load("llava").tiny(), {"stages.*.budget.steps": 1})
    results = train(
        system, home=tmp_path, run="ol", tracker=mlflow_tracker, options=api.RunOptions(workers=0)
    )
    found = events(tmp_path)
    assert [(e["job"]["name"], e["eventType"]) for e in found] == [
        (f"llava-tiny/{stage}", state)
        for stage in ("align", "instruct")
        for state in ("START", "COMPLETE")
    ]
    ids = [UUID(result.run_id or "") for result in results.values()]
    assert [UUID(e["run"]["runId"]) for e in found[::2]] == ids
    align, instruct = found[1], found[3]
    assert align["outputs"][0]["name"] == str(results["align"].artifact)
    assert align["outputs"][0]["name"] in {d["name"] for d in instruct["inputs"]}
    train(
        system, home=tmp_path, run="ol", tracker=mlflow_tracker, options=api.RunOptions(workers=0)
    )
    assert len(events(tmp_path)) == len(found)  # a finished stage is not reported again


def test_names_follow_the_stores(tmp_path: Path) -> None:
    places = ["s3://lab/sets/a", "models:/llava/2", "synthetic:shapes", "/data/b"]
    emit(tmp_path, Event("EVALUATION", "eval", "COMPLETE", inputs=[Artifact(p) for p in places]))
    names = [(d["namespace"], d["name"]) for d in events(tmp_path)[0]["inputs"]]
    assert names == [
        ("s3://lab", "sets/a"),
        ("mlflow", "models:/llava/2"),
        ("bridgework", "synthetic:shapes"),
        ("file", "/data/b"),
    ]


def test_a_failed_transport_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__RETRY__TOTAL", "0")
    emit(tmp_path, Event("STAGE", "llava/align", "START"))
    assert "an event of llava/align was not sent" in caplog.text
    assert not (tmp_path / openlineage_events.FILE).exists()


def test_disabled_events_write_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLINEAGE_DISABLED", "true")
    emit(tmp_path, Event("STAGE", "llava/align", "START"))
    assert not (tmp_path / openlineage_events.FILE).exists()
