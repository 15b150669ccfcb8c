"""Model registry: names, registration, and the challenger."""

import random
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch

from bridgework import __version__, artifacts
from bridgework.errors import SpecError, WeightsError
from bridgework.evaluation import HeldOutLoss, Ranking, results
from bridgework.evaluation.results import EvaluationRecord
from bridgework.evaluation.statistics import EvaluatedRows
from bridgework.system import EvalSpec, System, load
from bridgework.tracking.registry import challenge, is_folder, register_folder, split
from bridgework.tracking.tracker import CHALLENGER, Tracker, Version

METRIC = "ranking.accuracy"
LOSS = "heldout.loss"
RANKING, HELDOUT = Ranking(dataset="synthetic:shapes"), HeldOutLoss(dataset="synthetic:shapes")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"llava-{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def judged_by(*evals: EvalSpec) -> System:
    """Return LLaVA with these evaluations in its first stage."""
    system = load("llava").tiny()
    return replace(system, stages=(replace(system["align"], evals=evals), *system.stages[1:]))


def register(tracker: Tracker, name: str, weights: Path, *figures: float) -> list[Version]:
    """Register a version for each value, without alias; the weights differ."""
    versions = []
    for _ in figures:
        folder = weights / uuid4().hex
        state = {"w": torch.tensor([float(len(list(weights.iterdir())))])}
        info = artifacts.save(folder, state, system=judged_by(RANKING, HELDOUT), stage="align")
        run = tracker.start("align")
        model = tracker.output(run, name, str(folder), {"digest": info.digest})
        versions.append(tracker.register(name, model, run, str(folder), {"digest": info.digest}))
    return versions


def judged(
    version: Version, home: Path, metric: str, figure: float, *, evaluation: str = "the same"
) -> None:
    """Store an evaluation of 200 images in which the metric has this value."""
    keys = tuple(map(str, range(200)))
    if metric == METRIC:
        values = [
            float(i < round(200 * figure)) for i in random.Random(figure).sample(range(200), 200)
        ]
    else:
        noise = np.random.default_rng(0).normal(0.0, 0.05, 200)
        values = list(figure + noise - noise.mean())
    rows = EvaluatedRows(keys, keys).values(values)
    spec = RANKING if metric == METRIC else HELDOUT
    record = EvaluationRecord(
        name=spec.name, evaluation=evaluation, spec={}, datasets=(), weights=version.tags["digest"],
        metrics={metric: rows.mean}, better={metric: spec.better[metric.partition(".")[2]]},
        rows={metric: rows}, seconds=0.0, created=0.0, machine="", version=__version__,
    )  # fmt: skip
    results.write(record, results.folder_of(record.weights, home))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("llava", ("llava", "champion")),
        ("llava@challenger", ("llava", "challenger")),
        ("llava:3", ("llava", "3")),
    ],
)
def test_model_names_are_split(said: str, meant: tuple[str, str]) -> None:
    assert split(said) == meant


def test_name_with_a_slash_is_a_folder(tmp_path: Path) -> None:
    assert is_folder("runs/monday/align/artifact")
    assert is_folder(str(tmp_path))
    assert not is_folder("runs")  # a folder of that name here must not hide the model
    assert not is_folder("llava@challenger")


@pytest.mark.parametrize(("metric", "better", "worse"), [(METRIC, 0.9, 0.5), (LOSS, 1.5, 1.6)])
def test_the_challenger_is_only_replaced_by_one_that_is_better_beyond_its_interval(
    tracker: Tracker, name: str, weights: Path, home: Path, metric: str, better: float, worse: float
) -> None:
    first, second, third = register(tracker, name, weights, worse, better, worse)
    for version, figure in ((first, worse), (second, better), (third, worse)):
        judged(version, home, metric, figure)
    assert challenge(tracker, first, metric, home)[0].version == "1"
    assert challenge(tracker, second, metric, home)[0].version == "2"
    held, why = challenge(tracker, third, metric, home)
    assert (held.version, tracker.version(name, CHALLENGER).version) == ("2", "2")
    assert f"challenger stays {name}:2: its {metric} is {better:g}" in why


def test_a_difference_within_the_noise_does_not_replace_the_challenger(
    tracker: Tracker, name: str, weights: Path, home: Path
) -> None:
    first, second = register(tracker, name, weights, 0.50, 0.52)
    judged(first, home, METRIC, 0.50)
    judged(second, home, METRIC, 0.52)
    challenge(tracker, first, METRIC, home)
    held, why = challenge(tracker, second, METRIC, home)
    assert held.version == "1" and "rows would decide a difference of this size" in why


def test_metrics_of_other_evaluations_do_not_replace_the_challenger(
    tracker: Tracker, name: str, weights: Path, home: Path
) -> None:
    first, second = register(tracker, name, weights, 0.5, 0.9)
    judged(first, home, METRIC, 0.5)
    judged(second, home, METRIC, 0.9, evaluation="another one")
    challenge(tracker, first, METRIC, home)
    held, why = challenge(tracker, second, METRIC, home)
    assert held.version == "1"
    assert "not from the same evaluation" in why


def test_an_imported_folder_is_registered_once(tracker: Tracker, name: str, weights: Path) -> None:
    folder = weights / uuid4().hex
    artifacts.save(folder, {"w": torch.rand(1)}, system=judged_by(RANKING), stage="align")
    (folder / "parity.json").write_text("{}")
    version = register_folder(tracker, name, folder)
    assert (version.name, version.version) == (name, "1")
    assert Path(version.artifact) == folder.resolve()
    assert register_folder(tracker, name, folder).version == "1"
    assert register_folder(tracker, f"{name}-other", folder).version == "1"
    (run,) = tracker.find({"kind": "import", "digest": version.tags["digest"]})
    assert run[0] == version.run_id
    with pytest.raises(SpecError, match=r"expected e\.g\. my-blip"):
        register_folder(tracker, "my:blip", folder)
    with pytest.raises(WeightsError, match="is not an artifact"):
        register_folder(tracker, name, weights / "nowhere")
