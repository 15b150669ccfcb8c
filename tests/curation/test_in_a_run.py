"""A stage that reads what earlier stages make: BLIP's bootstrap, in a run and on the command line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bridgework import artifacts
from bridgework.cli import app
from bridgework.config import override
from bridgework.data.dataset import open_dataset
from bridgework.errors import DataError, RunError, SpecError
from bridgework.system import System, load
from bridgework.tracking.tracker import MemoryTracker
from tests.curation.support import flags, written
from tests.training.support import go, same, weights


def blip(home: Path) -> System:
    """The shortest program with a curation: its web is flags."""
    web = home / "flags"
    if not web.exists():
        written(web, list(flags())[:16])
    stages = tuple(replace(stage, evals=()) for stage in load("blip").tiny().stages)
    short = {"stages.*.budget.steps": 1, "stages.bootstrap.curation.sources": [str(web)]}
    return override(System(name="blip", paper="-", stages=stages), short)


def test_stage_reads_the_dataset_of_its_curation(home: Path, run: str) -> None:
    tracker, folder = MemoryTracker(), home / "runs" / run
    go(blip(home), home, run, stages=None, tracker=tracker)
    made = open_dataset(str(folder / "bootstrap" / "curated" / "capfilt"))
    for name in ("captioner", "filter"):
        assert (
            made.manifest.parameters[name] == artifacts.describe(folder / name / "artifact").digest
        )
    read = {d.name: d for d in artifacts.describe(folder / "bootstrap" / "artifact").datasets}
    assert (
        read["capfilt"].digest == made.manifest.digest
        and read["capfilt"].rows == made.manifest.rows
    )
    logged = {
        r.name: i.digest for r in tracker.runs.values() for i in r.inputs if i.name == "capfilt"
    }
    # of the stage, and of the run of the system, where the UI shows it too
    assert logged == {"bootstrap": made.manifest.digest, run: made.manifest.digest}


def test_a_finished_stage_needs_its_curated_data_no_more(home: Path, run: str) -> None:
    go(blip(home), home, run, stages=None)
    before = weights(home, run, "bootstrap")
    shutil.rmtree(home / "runs" / run / "bootstrap" / "curated")
    go(blip(home), home, run, stages=None)
    assert same(weights(home, run, "bootstrap"), before)
    assert not (home / "runs" / run / "bootstrap" / "curated").exists()


def test_requirements_of_a_curation_are_checked_before_writing(home: Path, run: str) -> None:
    with pytest.raises(
        RunError,
        match=r"its curation uses captioner, which this run has not trained\. Fix: train it first",
    ):
        go(blip(home), home, run, stages=["pretrain", "bootstrap"])
    lost = override(blip(home), {"stages.bootstrap.curation.sources": "not-here"})
    with pytest.raises(DataError, match="dataset 'not-here' not found"):
        go(lost, home, run, stages=None)
    assert not (home / "runs" / run).exists()


def test_command_prints_counts_and_draws_the_sheet(home: Path, run: str, tmp_path: Path) -> None:
    system = blip(home)
    go(system, home, run, stages=["pretrain", "captioner", "filter"])
    folder, web = home / "runs" / run, written(tmp_path / "web", list(flags())[:16])
    models = [f"{name}={folder / name / 'artifact'}" for name in ("captioner", "filter")]
    words = ["curate", "capfilt", web, str(tmp_path / "made"), *models]
    kept = ["threshold=-10000", "max_tokens=6"]
    done = CliRunner().invoke(app, [*words, *kept, "--explain"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    counts = manifest["parameters"]["counts"]
    assert sum(counts.values()) == 16 and manifest["parameters"]["max_tokens"] == 6
    for why, rows in counts.items():
        assert re.search(rf"^{why} +{rows} +{rows / 16:.1%}$", done.stdout, re.M), done.stdout
    assert str(tmp_path / "made") in done.stdout
    assert len(list((home / "curated").glob("made-*.png"))) == 1
    for wrong, said in (("top=0.9", "no field 'top'"), ("top_p", "got 'top_p'")):
        with pytest.raises(SpecError, match=said):
            CliRunner().invoke(app, [*words, wrong], catch_exceptions=False)
