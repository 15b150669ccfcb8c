"""Model cards: written from the record, read by the Hub's own library."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bridgework import api, override
from bridgework.evaluation import HeldOutLoss
from bridgework.hf.convert import export_hf
from bridgework.system import load
from bridgework.tracking import evaluations
from bridgework.tracking.card import Facts, model_card
from bridgework.tracking.mlflow_store import MLflowReader


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cards")
    system = override(load("llava").tiny(), {"stages.*.budget.steps": 1})
    results = api.train(system, stages=["align"], home=home, run="card", track=False)
    return results["align"].artifact


def test_card_states_data_training_and_figures_with_intervals(artifact: Path) -> None:
    facts = Facts(
        figures={"ranking.accuracy": 0.25, "bias.gender": 0.01},
        intervals={"ranking.accuracy": (0.1, 0.4, 40)},
        hours=0.5,
        tags={"git_commit": "0a1b2c3d4e5f"},
    )
    text = model_card(artifact, facts)
    card = ModelCard(text)
    assert card.data.library_name == "bridgework" and card.data.pipeline_tag == "image-text-to-text"
    assert {result.metric_type for result in card.data.eval_results} == set(facts.figures)
    for said in (
        "| ranking.accuracy | 0.25 | 0.1 to 0.4 | 40 |",
        "| bias.gender | 0.01 | not known | not known |",
        "Duration of the steps: 0.5 hours. Energy: not measured.",
        "Git commit: `0a1b2c3d4e5f`",
        "`bias.gender`",
        "Licenses of the data: CC0-1.0",
    ):
        assert said in text, text


def test_card_has_the_figures_of_stored_evaluations_with_their_intervals(
    artifact: Path, home: Path
) -> None:
    spec = HeldOutLoss(dataset="synthetic:shapes", rows=6)
    ((result, _),) = evaluations.evaluate(str(artifact), [spec], home)
    text = model_card(artifact)
    assert "Duration of the steps: " in text  # from the run's journal
    assert len(result.rows) == 4
    for figure in result.figures:
        if figure.interval is not None:
            rows = figure.interval.n
            low, high = figure.interval.low, figure.interval.high
            line = f"| {figure.name} | {figure.value:.4g} | {low:.4g} to {high:.4g} | {rows} |"
            assert line in text


def test_card_without_figures_says_so(artifact: Path) -> None:
    text = model_card(artifact, Facts())
    assert "No figures are recorded." in text and "No bias probe was run" in text


def test_every_export_has_a_card_that_transformers_may_read(artifact: Path, tmp_path: Path) -> None:
    export_hf(artifact, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"


def test_tracked_stage_has_its_card_in_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    system = override(load("llava").tiny(), {"stages.*.budget.steps": 1})
    results = api.train(system, stages=["align"], home=tmp_path, run="card")
    text = MLflowReader(None, tmp_path).text(results["align"].run_id or "", "README.md")
    assert text is not None and "# llava-tiny, stage align" in text
