"""Mixtures found by merging: the stand-in, the caps, and a search with real runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridgework.cli.mixtures import show
from bridgework.config import override
from bridgework.data import synthetic
from bridgework.data.dataset import write
from bridgework.data.plan.shares import requested
from bridgework.errors import SpecError
from bridgework.evaluation import HeldOutLoss
from bridgework.evaluation.base import Figure
from bridgework.evaluation.statistics import Interval
from bridgework.mixture import Group, Mixture, Source
from bridgework.system import System, load
from bridgework.training.options import RunOptions
from bridgework.tuning.mixture_search import MixtureOutcome, MixtureSearch

SIZES = {"large": 96, "middle": 48, "small": 24}
OPTIONS = RunOptions(workers=0, threads=1)


@pytest.fixture(scope="module")
def system(home: Path) -> System:
    """A tiny LLaVA on three sources; the captions of two of them belong to other images."""
    rows = list(synthetic.shapes(sum(SIZES.values())))
    start = 0
    for name, size in SIZES.items():
        part = rows[start : start + size]
        if name != "small":
            texts = [row.parts for row in part[1:] + part[:1]]
            part = [replace(row, parts=parts) for row, parts in zip(part, texts, strict=True)]
        about = {"source": "s", "license": "CC0-1.0", "made_by": "test"}
        folder = home / "datasets" / f"mix-{name}"
        if not folder.exists():
            write(part, str(folder), group_rows=8, shard_rows=32, **about)
        start += size
    tiny = load("llava").tiny()
    sources = tuple(Source(name=name, dataset=f"mix-{name}") for name in SIZES)
    align = replace(
        tiny["align"],
        data=replace(tiny["align"].data, sources=sources),
        evals=(HeldOutLoss(dataset="synthetic:shapes", rows=16),),
    )
    align = override(align, {"budget.steps": 12, "optim.peak_lr": 1e-2})
    return replace(tiny, stages=(align, *tiny.stages[1:]))


@pytest.fixture(scope="module")
def found(system: System, home: Path) -> MixtureSearch:
    return MixtureSearch(system, "align", home=home, run="mixture", options=OPTIONS)


def test_a_corner_of_the_simplex_is_the_model_of_its_source(found: MixtureSearch) -> None:
    own = found._evaluated(found.of_source(1))
    merged = found.merged(np.array([0.0, 1.0, 0.0]))
    assert merged.metrics == pytest.approx(own.metrics, rel=1e-6)


def test_a_merge_lies_between_its_models(found: MixtureSearch) -> None:
    differing = found._differing
    assert differing and all(key.startswith("bridge.") for key in differing)
    key = next(iter(differing))
    found.merged(np.array([0.5, 0.25, 0.25]))
    state = dict(found._pipeline.model.named_parameters())[key].detach()
    a, b, c = (tensor.to(state.device) for tensor in differing[key])
    np.testing.assert_allclose(state.numpy(), (0.5 * a + 0.25 * b + 0.25 * c).numpy(), atol=1e-6)


def test_caps_on_epochs_are_kept(system: System, home: Path) -> None:
    capped = MixtureSearch(system, "align", home=home, run="caps", max_epochs=0.8)
    draws = 12 * system["align"].budget.batch
    for given in ([1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.2, 0.7, 0.1]):
        weights = capped.capped(given)
        assert weights.sum() == pytest.approx(1)
        assert (weights * draws <= 0.8 * capped.sizes + 1e-9).all()


def test_settings_give_the_shares(found: MixtureSearch, system: System) -> None:
    weights = np.array([0.5, 0.125, 0.375])
    mixture = override(system, found.settings(weights))["align"].data
    assert requested(mixture, list(SIZES.values())) == pytest.approx(list(weights), abs=1e-3)


def test_alpha_of_a_mixture_by_size_is_found(found: MixtureSearch) -> None:
    assert found.nearest_alpha(found.by_size(0.5)) == pytest.approx(0.5)


@pytest.mark.slow
def test_a_search_costs_three_more_runs_than_sources(
    system: System, home: Path, found: MixtureSearch
) -> None:
    outcome = found.search(merges=40)
    runs = sorted(p.name.split("-")[0] for p in (home / "runs/mixture").iterdir() if p.is_dir())
    assert runs == ["best", "best", "source", "source", "source", "sqrt"]
    assert outcome.merges == 40
    scores = [figure.value for figure in outcome.scores]
    assert scores[0] == min(scores)
    for figure in (*outcome.scores, *outcome.predicted, *outcome.baselines.values()):
        assert figure.name == "heldout.loss" and figure.interval is not None
        assert figure.interval.low < figure.value < figure.interval.high
    gap = outcome.against["sqrt"]
    assert gap is not None
    assert outcome.verdict.startswith("better beyond") == (gap.high < 0)
    for number in range(3):  # no model of one source is better than the best merge
        corner = found.merged(np.eye(3)[number]).metrics["heldout.loss"]
        assert min(figure.value for figure in outcome.predicted) <= corner
    again = MixtureSearch(system, "align", home=home, run="mixture", options=OPTIONS).search(40)
    assert [list(w) for w in again.best] == [list(w) for w in outcome.best]
    assert again.scores == outcome.scores


def test_every_score_is_printed_with_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    def figure(value: float, *, rows: bool = True) -> Figure:
        found = Interval(value, value - 0.25, value + 0.25, 16, 16) if rows else None
        return Figure("heldout.loss", value, "lower", found)

    outcome = MixtureOutcome(
        sources=("a", "b"),
        influence={"a": {"heldout.loss": figure(3.5)}, "b": {}},
        merges=40,
        best=(np.array([0.25, 0.75]),),
        scores=(figure(1.5),),
        predicted=(figure(2.5),),
        baselines={"sqrt": figure(4.5), "uniform": figure(5.5, rows=False)},
        against={"sqrt": None},
        settings={"stages.align.data.alpha": "0"},
        alpha=0.5,
        verdict="not decided",
    )
    show(outcome, "heldout.loss")
    printed = " ".join(capsys.readouterr().out.split())
    for expected in (
        "a 3.5 [3.25, 3.75]",
        "best 1 25.0% 75.0% 1.5 [1.25, 1.75] 2.5 [2.25, 2.75]",
        "sqrt 4.5 [4.25, 4.75]",
        "uniform 5.5",
    ):
        assert expected in printed, printed
    recalls = {f"retrieval.image_to_text_r{k}": figure(0.01171) for k in (1, 5, 10, 50, 100)}
    show(replace(outcome, influence={"a": recalls}), "retrieval.image_to_text_r1")
    table = capsys.readouterr().out
    assert "…" not in table  # nothing is cut, on 80 columns


def test_a_stage_that_cannot_be_searched_is_refused(system: System, home: Path) -> None:
    align = system["align"]
    sources = align.data.sources

    def refused(said: str, data: Mixture, **options: Any) -> None:
        changed = replace(system, stages=(replace(align, data=data), *system.stages[1:]))
        with pytest.raises(SpecError, match=said):
            MixtureSearch(changed, "align", home=home, run="refused", **options)

    refused("at least two sources. Got 1", replace(align.data, sources=sources[:1]))
    refused(
        "holds groups of sources",
        replace(align.data, sources=(*sources[:1], Group(name="g", sources=sources[1:]))),
    )
    refused("caps on epochs allow", align.data, max_epochs=0.1)
    refused(
        "'heldout.los' ranks nothing; did you mean 'heldout.loss'", align.data, metric="heldout.los"
    )
    with pytest.raises(SpecError, match="no stage 'algn'"):
        MixtureSearch(system, "algn", home=home, run="refused")
    blind = replace(system, stages=(replace(align, evals=()), *system.stages[1:]))
    with pytest.raises(SpecError, match="has no evaluation"):
        MixtureSearch(blind, "align", home=home, run="refused")
