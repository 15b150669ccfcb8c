"""Promotion through a gate, rollback and history, in memory and in MLflow."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from bridgework import __version__, artifacts
from bridgework.errors import SpecError, TrackingError
from bridgework.evaluation import HeldOutLoss, Ranking, results
from bridgework.evaluation.gate import Gate, GateCheck
from bridgework.evaluation.results import EvaluationRecord
from bridgework.evaluation.statistics import EvaluatedRows
from bridgework.system import System, load
from bridgework.tracking import evaluations, promotion
from bridgework.tracking.mlflow_store import MLflowTracker
from bridgework.tracking.promotion import NotPromoted, history, promote, rollback
from bridgework.tracking.tracker import MemoryTracker, Tracker, Version
from tests.inference.tiny import pipeline

RANKING = Ranking(dataset="synthetic:shapes", rows=40, candidates=4)
HELDOUT = HeldOutLoss(dataset="synthetic:shapes", rows=40)
ROWS = 300
Candidate = Callable[..., Version]


@pytest.fixture
def name() -> str:
    """Name of a registered model, unique because all projects of a store share these names."""
    return f"llava-{uuid4().hex[:8]}"


def system() -> System:
    """Return LLaVA with two evaluations in its first stage."""
    tiny = load("llava").tiny()
    return replace(
        tiny, stages=(replace(tiny["align"], evals=(RANKING, HELDOUT)), *tiny.stages[1:])
    )


@pytest.fixture
def candidate(tracker: Tracker, name: str, tmp_path: Path, home: Path) -> Candidate:
    return registering(tracker, name, tmp_path, home)


def registering(tracker: Tracker, name: str, tmp_path: Path, home: Path) -> Candidate:
    """Return a function that registers a version with stored evaluations of this quality."""

    def register(accuracy: float, loss: float = 2.0) -> Version:
        folder = tmp_path / uuid4().hex
        info = artifacts.save(folder, {"w": torch.rand(4)}, system=system(), stage="align")
        run = tracker.start("align")
        model = tracker.output(run, name, str(folder), {"digest": info.digest})
        keys = tuple(map(str, range(ROWS)))
        noise = np.random.default_rng(0).normal(0.0, 0.1, ROWS)
        columns = {
            "ranking.accuracy": [float(i < round(ROWS * accuracy)) for i in range(ROWS)],
            "heldout.loss": list(loss + noise - noise.mean()),
        }
        for spec in (RANKING, HELDOUT):
            rows = {
                key: EvaluatedRows(keys, keys).values(values)
                for key, values in columns.items()
                if key.startswith(spec.name)
            }
            record = EvaluationRecord(
                name=spec.name,
                evaluation=results.identity(spec, home),
                spec={},
                datasets=(),
                weights=info.digest,
                metrics={key: one.mean for key, one in rows.items()},
                better={f"{spec.name}.{key}": way for key, way in spec.better.items()},
                rows=rows,
                seconds=1.0,
                created=1.0,
                machine="",
                version=__version__,
            )
            results.write(record, results.folder_of(info.digest, home))
        return tracker.register(name, model, run, str(folder), {"digest": info.digest})

    return register


def champion(tracker: Tracker, name: str) -> str:
    return tracker.version(name, "champion").version


def test_the_first_champion_needs_no_comparison(
    tracker: Tracker, name: str, candidate: Candidate, home: Path
) -> None:
    candidate(0.5)
    done = promote(tracker, f"{name}:1", home=home)
    assert (done.verdict, done.candidate, done.champion) == ("promoted", "1", "")
    assert champion(tracker, name) == "1"


def test_a_better_version_becomes_champion_with_its_figures_on_record(
    tracker: Tracker, name: str, candidate: Candidate, home: Path
) -> None:
    for accuracy in (0.5, 0.7):
        candidate(accuracy)
    promote(tracker, f"{name}:1", home=home)
    done = promote(tracker, f"{name}:2", home=home)
    improved, guarded = done.checks
    assert (improved.figure, improved.rule, improved.outcome) == (
        "ranking.accuracy", "improve", "passed",
    )  # fmt: skip
    assert improved.new == pytest.approx(0.7) and improved.old == pytest.approx(0.5)
    assert (improved.low or 0) > 0 and improved.n == ROWS
    assert (guarded.figure, guarded.rule, guarded.outcome) == ("heldout.loss", "guard", "passed")
    assert champion(tracker, name) == "2"
    assert tracker.version(name, "previous").version == "1"
    for version in "12":
        assert tracker.version(name, version).tags["decision"] == done.run_id


@pytest.mark.parametrize(
    ("accuracy", "loss", "said"),
    [
        (0.4, 2.0, r"ranking\.accuracy: it is not better \(0\.4 against 0\.5, difference -0\.1"),
        (0.5, 2.0, r"ranking\.accuracy: it is not better"),
        (0.7, 2.5, r"heldout\.loss: it is worse by more than 0\.02 \(2\.5 against 2, .* lower is"),
    ],
)
def test_a_version_that_is_not_better_is_refused_and_no_alias_moves(
    tracker: Tracker,
    name: str,
    candidate: Candidate,
    home: Path,
    accuracy: float,
    loss: float,
    said: str,
) -> None:
    candidate(0.5)
    candidate(accuracy, loss)
    promote(tracker, f"{name}:1", home=home)
    with pytest.raises(NotPromoted, match=rf"{name}:2 was not promoted .*{said}") as refused:
        promote(tracker, f"{name}:2", home=home)
    assert refused.value.decision.verdict == "refused"
    assert champion(tracker, name) == "1" and tracker.version(name, "2").aliases == ()
    assert [one.verdict for one in history(tracker, name)] == ["promoted", "refused"]


def test_a_difference_that_the_rows_cannot_decide_needs_more_rows(
    tracker: Tracker, name: str, candidate: Candidate, home: Path
) -> None:
    candidate(0.5)
    candidate(0.51)
    promote(tracker, f"{name}:1", home=home)
    with pytest.raises(
        NotPromoted, match=r"it needs [\d,]+ more rows .* Fix: evaluate on more rows"
    ):
        promote(tracker, f"{name}:2", home=home, metric="ranking.accuracy")
    assert history(tracker, name)[-1].verdict == "undecided"
    assert champion(tracker, name) == "1"


def test_a_lower_loss_is_promoted_without_a_flag(
    tracker: Tracker, name: str, candidate: Candidate, home: Path
) -> None:
    candidate(0.5, 2.0)
    candidate(0.5, 1.9)
    candidate(0.5, 2.1)
    promote(tracker, f"{name}:1", home=home)
    with pytest.raises(NotPromoted, match="lower is better"):
        promote(tracker, f"{name}:3", home=home, metric="heldout.loss")
    assert promote(tracker, f"{name}:2", home=home, metric="heldout.loss").candidate == "2"


def test_force_needs_a_reason_which_is_on_record(
    tracker: Tracker, name: str, candidate: Candidate, home: Path
) -> None:
    candidate(0.5)
    candidate(0.1)
    promote(tracker, f"{name}:1", home=home)
    with pytest.raises(SpecError, match="the reason is kept on record"):
        promote(tracker, f"{name}:2", home=home, force="  ")
    promote(tracker, f"{name}:2", home=home, force="the old one leaks a license")
    last = history(tracker, name)[-1]
    assert (last.verdict, last.reason) == ("forced", "the old one leaks a license")
    assert champion(tracker, name) == "2" and last.by and last.at


def test_the_champion_is_not_promoted_again(
    tracker: Tracker, name: str, candidate: Candidate, home: Path
) -> None:
    candidate(0.5)
    promote(tracker, f"{name}:1", home=home)
    with pytest.raises(TrackingError, match=f"{name}:1 is the champion already"):
        promote(tracker, name, home=home)


def test_rollback_goes_back_one_champion_at_a_time_and_never_forward(
    tracker: Tracker, name: str, candidate: Candidate, home: Path
) -> None:
    for number, accuracy in enumerate((0.3, 0.5, 0.7), 1):
        candidate(accuracy)
        promote(tracker, f"{name}:{number}", home=home)
    assert tracker.champions(name) == ("1", "2", "3")
    assert rollback(tracker, name, home=home).candidate == "2"
    assert tracker.version(name, "previous").version == "1"
    assert rollback(tracker, name, "slow", home=home).candidate == "1"
    assert champion(tracker, name) == "1"
    with pytest.raises(TrackingError, match="Got version 1, the first one"):
        rollback(tracker, name, home=home)
    with pytest.raises(TrackingError, match="no version or alias 'previous'"):
        tracker.version(name, "previous")
    decisions = [(one.verdict, one.candidate, one.champion) for one in history(tracker, name)]
    assert decisions[-2:] == [("rolled back", "2", "3"), ("rolled back", "1", "2")]
    assert history(tracker, name)[-1].reason == "slow"


def test_champions_of_an_older_version_are_those_of_its_aliases(
    tracker: Tracker, name: str, candidate: Candidate, home: Path
) -> None:
    for accuracy in (0.3, 0.5):
        candidate(accuracy)
    assert tracker.champions(name) == ()
    tracker.alias(name, "champion", "2")
    tracker.alias(name, "previous", "1")
    assert tracker.champions(name) == ("1", "2")
    assert rollback(tracker, name, home=home).candidate == "1"
    tracker.alias(name, "champion", "2")  # e.g. in MLflow's UI
    assert tracker.champions(name) == ("1", "2")


def test_of_two_promotions_at_once_one_wins_and_the_other_is_refused(
    tracker: Tracker, name: str, candidate: Candidate, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for accuracy in (0.3, 0.6, 0.7):
        candidate(accuracy)
    promote(tracker, f"{name}:1", home=home)
    both_judged, said = threading.Barrier(2), dict[str, str]()
    judge = promotion.judge

    def wait(
        gate: Gate, new: Sequence[EvaluationRecord], old: Sequence[EvaluationRecord]
    ) -> list[GateCheck]:
        both_judged.wait(60)
        return judge(gate, new, old)

    monkeypatch.setattr(promotion, "judge", wait)

    def run(version: str) -> None:
        try:
            said[version] = promote(tracker, f"{name}:{version}", home=home).verdict
        except TrackingError as error:
            said[version] = str(error)

    threads = [threading.Thread(target=run, args=(version,)) for version in "23"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = (version for version, text in said.items() if text == "promoted")
    (lost,) = (text for text in said.values() if text != "promoted")
    assert f"the champion is now version {won}" in lost and "Fix: promote again" in lost
    assert tracker.champions(name) == ("1", won)
    assert tracker.version(name, "previous").version == "1"


def test_unknown_names_are_rejected_with_a_suggestion(
    tracker: Tracker, name: str, candidate: Candidate, home: Path
) -> None:
    candidate(0.5)
    candidate(0.6)
    with pytest.raises(TrackingError, match=f"did you mean '{name}'"):
        promote(tracker, name[:-1], home=home)
    with pytest.raises(TrackingError, match="is registered"):
        rollback(tracker, "unheard-of", home=home)
    with pytest.raises(TrackingError, match="is registered"):
        history(tracker, "unheard-of")
    promote(tracker, f"{name}:1", home=home)
    with pytest.raises(SpecError, match=r"no evaluation returns 'ranking\.acuracy'; did you mean"):
        promote(tracker, f"{name}:2", home=home, metric="ranking.acuracy")
    with pytest.raises(SpecError, match="exclude each other"):
        gate = Gate(improve=("ranking.accuracy",))
        promote(tracker, f"{name}:2", home=home, metric="ranking.accuracy", gate=gate)


def test_a_decision_is_a_run_of_mlflow_linked_to_both_models(
    mlflow_tracker: MLflowTracker, store: Path, name: str, tmp_path: Path, home: Path
) -> None:
    make = registering(mlflow_tracker, name, tmp_path, home)
    make(0.5)
    make(0.7)
    promote(mlflow_tracker, f"{name}:1", home=home)
    done = promote(mlflow_tracker, f"{name}:2", home=home)
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    run = client.get_run(done.run_id)
    assert run.info.run_name == f"promoted {name}:2" and run.data.tags["verdict"] == "promoted"
    assert len(run.inputs.model_inputs) == 2
    assert run.data.metrics["eval/ranking.accuracy.difference"] == pytest.approx(0.2)
    file = client.download_artifacts(done.run_id, "decision.json", str(tmp_path))
    stored = json.loads(Path(file).read_text())
    assert stored["checks"][0]["figure"] == "ranking.accuracy" and stored["by"] == done.by


def test_missing_evaluations_are_run_and_stored_ones_are_not(
    tracker: Tracker, name: str, tmp_path: Path, home: Path
) -> None:
    """`eval`, then `promote`: the evaluation is used; without it, promote evaluates."""
    said: list[str] = []
    own = 10 * isinstance(tracker, MemoryTracker)  # weights that no other test has evaluated
    for number in (1, 2):
        pipe = pipeline()
        with torch.no_grad():
            next(iter(pipe.model.bridge.parameters())).add_(number + own)
        stage = replace(pipe.stage, evals=(HELDOUT,))
        folder = tmp_path / str(number)
        info = artifacts.save(
            folder, pipe.model.state_dict(), stage=stage.name,
            system=System(name="judged", paper="", stages=(stage,)),
        )  # fmt: skip
        run = tracker.start("align")
        model = tracker.output(run, name, str(folder), {"digest": info.digest})
        tracker.register(name, model, run, str(folder), {"digest": info.digest})
    promote(tracker, f"{name}:1", home=home)
    evaluations.evaluate(str(folder), [HELDOUT], home, tracker=tracker)
    try:
        decision = promote(tracker, f"{name}:2", home=home, say=said.append)
    except NotPromoted as refused:
        decision = refused.decision
    assert decision.checks[0].figure == "heldout.loss" and decision.checks[0].n == 40
    assert [line for line in said if "not evaluated yet" in line] == [
        f"{tmp_path / '1'}: heldout not evaluated yet"
    ]
    runs = tracker.find({"kind": "evaluation", "digest": info.digest})
    assert len(runs) == 1


def test_an_evaluation_is_a_run_below_the_one_that_made_the_weights(
    mlflow_tracker: MLflowTracker, store: Path, tmp_path: Path, home: Path
) -> None:
    pipe = pipeline()
    artifact = tmp_path / "artifact"
    info = artifacts.save(
        artifact, pipe.model.state_dict(), stage=pipe.stage.name,
        system=System(name="judged", paper="", stages=(pipe.stage,)),
    )  # fmt: skip
    made = mlflow_tracker.start("align")
    model = mlflow_tracker.output(made, "judged", str(artifact), {"digest": info.digest})
    specs = [replace(HELDOUT, rows=6), replace(RANKING, rows=6)]
    for _ in range(2):  # the same evaluation again is the same run
        done = evaluations.evaluate(str(artifact), specs, home, tracker=mlflow_tracker)
    found = mlflow_tracker.find({"kind": "evaluation", "digest": info.digest})
    assert len(found) == 2
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    run = client.get_run(found[0][0])
    assert run.info.run_name == "eval heldout" and run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == made
    loss = done[0][0].metrics["heldout.loss"]
    assert run.data.metrics["eval/heldout.loss"] == pytest.approx(loss)
    assert run.data.metrics["interval/heldout.loss.n"] == 6
    assert run.data.metrics["interval/heldout.loss.low"] < loss
    assert run.data.params["rows"] == "6"
    assert run.inputs.dataset_inputs[0].tags[0].value == "evaluation"
    files = [file.path for file in client.list_artifacts(found[0][0], "eval")]
    assert files == [f"eval/{done[0][1].file_name}"]
    logged = {m.key: m for m in client.get_logged_model(model).metrics}
    assert logged["eval/heldout.loss"].dataset_digest == done[0][1].datasets[0].digest[:12]


def test_a_tracker_that_does_not_answer_keeps_the_record(tmp_path: Path, home: Path) -> None:
    class Silent(MemoryTracker):
        def produced(self, digest: str, artifact: str = "") -> None:
            raise TrackingError("MLflow does not answer")

    pipe, artifact, said = pipeline(), tmp_path / "artifact", list[str]()
    info = artifacts.save(
        artifact, pipe.model.state_dict(), stage=pipe.stage.name,
        system=System(name="silent", paper="", stages=(pipe.stage,)),
    )  # fmt: skip
    evaluations.evaluate(
        str(artifact), [replace(HELDOUT, rows=4)], tmp_path, tracker=Silent(), say=said.append
    )
    assert any("MLflow does not answer; the evaluation is only in" in line for line in said)
    assert len(results.records_of(str(artifact), info.digest, tmp_path)) == 1


def test_evaluations_and_promotions_are_openlineage_events(
    name: str, tmp_path: Path, home: Path
) -> None:
    memory = MemoryTracker()
    make = registering(memory, name, tmp_path, home)
    make(0.5)
    make(0.4)
    place = home / "openlineage.jsonl"
    before = len(place.read_text().splitlines()) if place.exists() else 0
    promote(memory, f"{name}:1", home=home)
    with pytest.raises(NotPromoted):
        promote(memory, f"{name}:2", home=home)
    events = [json.loads(line) for line in place.read_text().splitlines()[before:]]
    assert [event["eventType"] for event in events] == ["COMPLETE", "ABORT"]
    assert all(event["job"]["facets"]["jobType"]["jobType"] == "PROMOTION" for event in events)
