"""Evaluations held against plain loops: what each figure says, and on which rows."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridgework.config import flat, from_dict, override, to_dict
from bridgework.data.dataset import open_dataset, write
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, SpecError
from bridgework.evaluation import VQA, HeldOutLoss, Ranking, Retrieval
from bridgework.evaluation.base import EvalExample, draw, draw_pairs
from bridgework.evaluation.likelihood import draw_candidates, first_is_best
from bridgework.evaluation.retrieval import within
from bridgework.inference.pipeline import Pipeline
from bridgework.system import Scoring
from tests.inference.tiny import picture, pipe_of, pipeline

DATASET = "synthetic:shapes"
EVALS = (HeldOutLoss(dataset=DATASET), Ranking(dataset=DATASET), Retrieval(dataset=DATASET))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline()


def recall(*scores: Any) -> float:
    """Return the share of rows with an own column within the cut."""
    return float(within(*scores).double().mean())


def keep(tmp_path: Path, samples: Iterator[Sample] | list[Sample]) -> str:
    path = str(tmp_path / "kept")
    write(samples, path, source="test", license="CC0-1.0", made_by="test")
    return path


# --- held-out loss ---------------------------------------------------------------------------------------------------


def test_held_out_loss_is_the_mean_over_tokens(pipe: Pipeline, home: Path) -> None:
    spec = HeldOutLoss(dataset=DATASET, rows=7, seed=3)
    metrics = spec.run(pipe, home).metrics
    items = draw(spec, pipe, home)
    images = [item.sample.images[0] for item in items]
    shift = next(
        s
        for s in range(1, 7)
        if mean_loss(pipe, items, images, s) == pytest.approx(metrics["heldout.loss_shuffled"])
    )
    assert shift > 0
    assert metrics["heldout.loss"] == pytest.approx(mean_loss(pipe, items, images, 0))
    assert metrics["heldout.perplexity"] == pytest.approx(math.exp(metrics["heldout.loss"]))
    assert metrics["heldout.gap"] == pytest.approx(
        metrics["heldout.loss_shuffled"] - metrics["heldout.loss"]
    )


def mean_loss(pipe: Pipeline, items: list[EvalExample], images: list[bytes], shift: int) -> float:
    nats, tokens = 0.0, 0
    for i, item in enumerate(items):
        [score] = pipe.scores([item.conversation], [[images[i - shift]]])
        nats, tokens = nats - score.loglik, tokens + score.tokens
    return nats / tokens


def test_a_model_that_cannot_see_has_no_gap(home: Path) -> None:
    blind = pipeline()
    with torch.no_grad():
        blind.model.bridge.get_parameter("linear_2.weight").zero_()
    metrics = HeldOutLoss(dataset=DATASET, rows=8).run(blind, home).metrics
    assert metrics["heldout.perplexity"] == pytest.approx(math.exp(metrics["heldout.loss"]))
    assert metrics["heldout.gap"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["heldout.loss"] > 0


def test_conversations_without_images_take_part(pipe: Pipeline, home: Path, tmp_path: Path) -> None:
    said = (Part("user", text="Hello?"), Part("assistant", text="Hello."))
    path = keep(tmp_path, [Sample("text", (), said), *shapes(3)])
    assert HeldOutLoss(dataset=path, rows=4).run(pipe, home).metrics["heldout.loss"] > 0
    only = keep(tmp_path / "text", [Sample("text", (), said), Sample("more", (), said)])
    with pytest.raises(DataError, match=r"Got 0 images in .*expected at least 2"):
        HeldOutLoss(dataset=only).run(pipe, home)


# --- ranking ---------------------------------------------------------------------------------------------------------


def test_ranking_is_the_share_of_rows_whose_own_caption_is_first(
    pipe: Pipeline, home: Path
) -> None:
    spec = Ranking(dataset=DATASET, rows=9, candidates=3, seed=5)
    result = spec.run(pipe, home)
    items = draw_pairs(spec, pipe, home, at_least=3)
    with_prior = without = 0
    for row, chosen in enumerate(draw_candidates(9, 3, 5)):
        captions = [items[c].sample.text for c in chosen]
        ranked = pipe.rank(items[row].sample.images[0], captions)
        with_prior += ranked[0].candidate == captions[0]
        without += int(pipe.log_likelihoods(items[row].sample.images[0], captions).argmax()) == 0
    assert result.metrics == {
        "ranking.accuracy": pytest.approx(with_prior / 9),
        "ranking.accuracy_without_prior": pytest.approx(without / 9),
        "ranking.chance": pytest.approx(1 / 3),
    }
    assert result.pictures.keys() == {"ranking"}


def test_candidates_are_the_row_itself_and_different_others() -> None:
    chosen = draw_candidates(rows=30, count=20, seed=0)
    assert (chosen[:, 0] == np.arange(30)).all()
    assert all(len(set(row)) == 20 for row in chosen.tolist())
    assert (chosen == draw_candidates(30, 20, 0)).all() and (
        chosen != draw_candidates(30, 20, 1)
    ).any()
    assert sorted(draw_candidates(rows=4, count=4, seed=0)[2].tolist()) == [0, 1, 2, 3]


def test_a_tie_is_not_a_win() -> None:
    values = torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    assert first_is_best(values).tolist() == [False, True, False]


def test_each_row_goes_through_the_vision_tower_once(home: Path) -> None:
    pipe, seen = pipeline(), [0]
    pipe.model.vision.register_forward_hook(
        lambda module, args, output: seen.__setitem__(0, seen[0] + len(args[0]))
    )
    Ranking(dataset=DATASET, rows=9, candidates=5).run(pipe, home)
    assert seen[0] == 9 + 1  # and the square of the mean color
    seen[0] = 0
    HeldOutLoss(dataset=DATASET, rows=9).run(pipe, home)
    assert seen[0] == 9


# --- retrieval -------------------------------------------------------------------------------------------------------


def test_recall_is_that_of_a_loop() -> None:
    alike = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(20)
    for cut in (1, 5):
        hits = sum(
            sorted(row.tolist(), reverse=True).index(row[i].item()) < cut
            for i, row in enumerate(alike)
        )
        assert recall(alike, cut) == pytest.approx(hits / 20)
    assert recall(torch.eye(4), 1) == 1.0
    assert recall(torch.zeros(4, 4), 1) == 0.0


def test_retrieval_compares_pooled_vectors_both_ways(pipe: Pipeline, home: Path) -> None:
    spec = Retrieval(dataset=DATASET, rows=20)
    metrics = spec.run(pipe, home).metrics
    items = draw_pairs(spec, pipe, home, at_least=2)
    alike = (
        pipe.embed_images([i.sample.images[0] for i in items])
        @ pipe.embed_texts([i.sample.text for i in items]).T
    )
    assert metrics == {
        "retrieval.image_to_text_r1": pytest.approx(recall(alike, 1)),
        "retrieval.image_to_text_r5": pytest.approx(recall(alike, 5)),
        "retrieval.text_to_image_r1": pytest.approx(recall(alike.T, 1)),
        "retrieval.text_to_image_r5": pytest.approx(recall(alike.T, 5)),
        "retrieval.image_to_text_r10": pytest.approx(recall(alike, 10)),
        "retrieval.text_to_image_r10": pytest.approx(recall(alike.T, 10)),
        "retrieval.chance_r1": pytest.approx(1 / 20),
        "retrieval.chance_r5": pytest.approx(5 / 20),
        "retrieval.chance_r10": pytest.approx(10 / 20),
    }


def test_a_bridge_that_was_taught_the_captions_finds_them(home: Path) -> None:
    """Half a minute of a real run in small: the pool_features vectors of 16 pairs are pulled together."""
    pipe, spec = pipeline(), Retrieval(dataset=DATASET, rows=16)
    items = draw_pairs(spec, pipe, home, at_least=16)
    seen = pipe.inputs.features([item.squares[0] for item in items])
    texts = pipe.embed_texts([item.sample.text for item in items])
    centre = texts.mean(0)
    optimizer = torch.optim.Adam(pipe.model.bridge.parameters(), lr=1e-2)
    before = spec.run(pipe, home).metrics["retrieval.image_to_text_r1"]
    for _ in range(60):
        images = torch.nn.functional.normalize(pipe.model.images(None, seen).mean(1), dim=-1)
        loss = torch.nn.functional.cross_entropy(
            (images - centre) @ (texts - centre).T / 0.01, torch.arange(16)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = spec.run(pipe, home).metrics["retrieval.image_to_text_r1"]
    assert after > 0.8 > before


# --- tiles and videos ------------------------------------------------------------------------------------------------

TILED = ("xgen_mm/instruct", "llava:next/instruct")


def wide(count: int) -> list[Sample]:
    """Pairs of pictures in different shapes, which are cut into different tiles."""
    sizes = [(64, 128), (128, 64), (64, 64), (96, 128)]
    return [pair(f"w{i}", picture(i, sizes[i % 4]), f"a picture, {i}") for i in range(count)]


@pytest.mark.parametrize("name", TILED)
def test_held_out_loss_reads_the_tiles_that_training_reads(
    name: str, home: Path, tmp_path: Path
) -> None:
    pipe = pipe_of(name)
    spec = HeldOutLoss(dataset=keep(tmp_path, wide(6)), rows=6)
    metrics = spec.run(pipe, home).metrics
    items = draw(spec, pipe, home)
    images = [item.sample.images[0] for item in items]
    assert metrics["heldout.loss"] == pytest.approx(mean_loss(pipe, items, images, 0), abs=1e-4)
    others = [mean_loss(pipe, items, images, shift) for shift in range(1, 6)]
    assert any(
        metrics["heldout.loss_shuffled"] == pytest.approx(other, abs=1e-4) for other in others
    )
    bases = [pipe.inputs.encode_images([image])[0].features[:1] for image in images]
    scores = [
        pipe.scores([item.conversation], [base])[0] for item, base in zip(items, bases, strict=True)
    ]
    untiled = -sum(score.loglik for score in scores) / sum(score.tokens for score in scores)
    assert metrics["heldout.loss"] != pytest.approx(untiled, abs=1e-4)


@pytest.mark.parametrize("name", TILED)
def test_ranking_reads_the_tiles_that_training_reads(name: str, home: Path, tmp_path: Path) -> None:
    pipe = pipe_of(name)
    spec = Ranking(dataset=keep(tmp_path, wide(8)), rows=8, candidates=4)
    metrics = spec.run(pipe, home).metrics
    items = draw_pairs(spec, pipe, home, at_least=4)
    with_prior = without = 0
    for row, chosen in enumerate(draw_candidates(8, 4, 0)):
        captions = [items[c].sample.text for c in chosen]
        image, asked = items[row].sample.images[0], pipe.inputs.about()
        with_prior += (
            pipe.rank_answers(asked, [image], captions, scoring=Scoring(prior=True))[0].candidate
            == captions[0]
        )
        without += (
            pipe.rank_answers(asked, [image], captions, scoring=Scoring(prior=False))[0].candidate
            == captions[0]
        )
    assert metrics["ranking.accuracy"] == pytest.approx(with_prior / 8)
    assert metrics["ranking.accuracy_without_prior"] == pytest.approx(without / 8)


@pytest.mark.parametrize(
    "spec", [HeldOutLoss(dataset="x"), Ranking(dataset="x", candidates=3), VQA(dataset="x")]
)
def test_video_rows_use_all_frames(
    spec: HeldOutLoss | Ranking | VQA, home: Path, tmp_path: Path
) -> None:
    pipe = pipe_of("flamingo/train")
    rows = []
    for i in range(5):
        frames = tuple(picture(10 * i + frame, (64, 64)) for frame in range(3))
        shown = tuple(Part("caption", image=frame) for frame in range(3))
        parts = (*shown, Part("caption", text=f"a film, {i}"))
        rows.append(Sample(f"v{i}", frames, parts, times_s=(0.0, 1.0, 2.0)))
    if isinstance(spec, Ranking):  # of pairs
        rows = [pair(f"p{i}", row.images[0], f"a picture, {i}") for i, row in enumerate(rows)]
    path = keep(tmp_path, rows)
    metrics = override(spec, {"dataset": path, "rows": "5"}).run(pipe, home).metrics
    assert all(np.isfinite(value) for value in metrics.values())
    if isinstance(spec, HeldOutLoss):
        items = draw(override(spec, {"dataset": path, "rows": "5"}), pipe, home)
        nats = [pipe.scores([item.conversation], [[item.sample.images]])[0] for item in items]
        assert metrics["heldout.loss"] == pytest.approx(
            -sum(score.loglik for score in nats) / sum(score.tokens for score in nats), abs=1e-4
        )


def test_ranking_by_half_of_the_prior_is_that_of_a_loop(pipe: Pipeline, home: Path) -> None:
    how = Scoring(prior_weight=0.5)
    spec = Ranking(dataset=DATASET, rows=30, candidates=5, scoring=how)
    items, asked = draw_pairs(spec, pipe, home, at_least=5), pipe.inputs.about()
    blank = pipe.inputs.blank_images(pipe.inputs.encode_images([items[0].sample.images[0]]))
    right = 0
    for row, chosen in enumerate(draw_candidates(30, 5, 0)):
        texts = [items[c].sample.text for c in chosen]
        given = pipe.score_answers(asked, list(items[row].sample.images), texts)
        prior = pipe.score_answers(asked, blank, texts)
        scores = [a.loglik - 0.5 * b.loglik for a, b in zip(given, prior, strict=True)]
        right += scores.index(max(scores)) == 0
        best = pipe.rank_answers(asked, list(items[row].sample.images), texts, scoring=how)[0]
        assert best.score == pytest.approx(max(scores), abs=1e-4)
    assert spec.run(pipe, home).metrics["ranking.accuracy"] == pytest.approx(right / 30)
    others = [replace(spec, scoring=Scoring()), replace(spec, scoring=Scoring(prior=False))]
    for other in others:
        assert other.run(pipe, home).metrics["ranking.accuracy"] != pytest.approx(right / 30)


def test_ranking_by_the_mean_prior_of_other_images_is_that_of_a_loop(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    others = keep(tmp_path, [pair(f"o{i}", s.images[0], f"o {i}") for i, s in enumerate(shapes(3))])
    spec = Ranking(dataset=DATASET, rows=20, candidates=5, prior_images=others, prior_rows=3)
    assert spec.datasets == (DATASET, others)
    references = spec.references(pipe, home)
    assert sorted(references) == sorted(s.images[0] for s in shapes(3))
    items, asked, right = draw_pairs(spec, pipe, home, at_least=5), pipe.inputs.about(), 0
    for row, chosen in enumerate(draw_candidates(20, 5, 0)):
        texts = [items[c].sample.text for c in chosen]
        nats_RC = [
            [answer.loglik for answer in pipe.score_answers(asked, [image], texts)]
            for image in (items[row].sample.images[0], *references)
        ]
        scores = [own - sum(prior) / 3 for own, *prior in zip(*nats_RC, strict=True)]
        right += scores.index(max(scores)) == 0
    assert spec.run(pipe, home).metrics["ranking.accuracy"] == pytest.approx(right / 20)
    blank = replace(spec, prior_images=None).run(pipe, home).metrics["ranking.accuracy"]
    assert blank != pytest.approx(right / 20)
    with pytest.raises(SpecError, match=r"ranking\.prior_rows: .* Got 0; expected"):
        Ranking(dataset=DATASET, prior_rows=0)


@pytest.mark.parametrize("weight", [0.0, -0.5, float("nan"), float("inf")])
def test_a_weight_of_the_prior_is_above_0(weight: float) -> None:
    with pytest.raises(SpecError, match=r"scoring\.prior_weight: .* Got .* expected"):
        Scoring(prior_weight=weight)


def test_ranking_by_the_mean_over_tokens_is_that_of_a_loop(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    rows = [
        pair(f"r{i}", s.images[0], "word " * (1 + i % 4) + str(i)) for i, s in enumerate(shapes(9))
    ]
    how = Scoring(prior=False, per_token=True)
    spec = Ranking(dataset=keep(tmp_path, rows), rows=9, candidates=4, scoring=how)
    items, right = draw_pairs(spec, pipe, home, at_least=4), 0
    for row, chosen in enumerate(draw_candidates(9, 4, 0)):
        texts = [items[c].sample.text for c in chosen]
        answers = pipe.score_answers(pipe.inputs.about(), list(items[row].sample.images), texts)
        means = [answer.loglik / answer.tokens for answer in answers]
        right += means.index(max(means)) == 0
    assert spec.run(pipe, home).metrics["ranking.accuracy"] == pytest.approx(right / 9)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_the_seed_draws_the_rows(pipe: Pipeline, home: Path) -> None:
    def keys(seed: int) -> list[str]:
        return [
            i.sample.key for i in draw(HeldOutLoss(dataset=DATASET, rows=10, seed=seed), pipe, home)
        ]

    expected = [f"shapes-{row:06d}" for row in random.Random(4).sample(range(256), 100)[:10]]
    assert keys(4) == keys(4) == expected != keys(5)


def test_rows_that_cannot_be_read_are_passed_over(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    broken = [pair(f"broken-{i}", b"\x89PNG\r\n\x1a\n", "a caption") for i in range(20)]
    long = [Sample("long", (), (Part("user", text="x" * 600), Part("assistant", text="y")))]
    path = keep(tmp_path, [*broken, *long, *shapes(6)])
    items = draw(HeldOutLoss(dataset=path, rows=50), pipe, home)
    assert sorted(i.sample.key for i in items) == [f"shapes-{row:06d}" for row in range(6)]
    only = keep(tmp_path / "broken", broken)
    with pytest.raises(DataError, match="none of the rows"):
        HeldOutLoss(dataset=only).run(pipe, home)


def test_pairs_have_one_image_and_a_text_of_their_own(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    image = next(shapes(1)).images[0]
    said = (Part("user", image=0), Part("user", text="What?"), Part("assistant", text="A thing."))
    path = keep(
        tmp_path,
        [
            pair("a", image, "one"),
            pair("b", image, "one"),
            pair("c", image, "two"),
            Sample("d", (image,), said),
        ],
    )
    spec = Ranking(dataset=path, rows=4, candidates=2)
    assert sorted(i.sample.text for i in draw_pairs(spec, pipe, home, at_least=2)) == ["one", "two"]
    with pytest.raises(DataError, match=r"Got 2; expected at least 3"):
        Ranking(dataset=path, rows=4, candidates=3).run(pipe, home)


def test_prompts_of_an_evaluation_go_before_the_stage_s_own(pipe: Pipeline, home: Path) -> None:
    for prompts, asked in (((), "What is shown?"), (("Why?",), "Why?")):
        [item] = draw(HeldOutLoss(dataset=DATASET, rows=2, prompts=prompts), pipe, home)[:1]
        assert asked in "".join(part.text or "" for part in item.conversation)
    own = Ranking(dataset=DATASET, rows=6, candidates=3).run(pipe, home).metrics
    other = (
        Ranking(dataset=DATASET, rows=6, candidates=3, prompts=("What is shown?",))
        .run(pipe, home)
        .metrics
    )
    assert own == other


# --- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["plain", "v1", "chat"])
@pytest.mark.parametrize("spec", EVALS, ids=lambda spec: spec.name)
def test_every_tiny_evaluation_runs_under_every_template(
    spec: HeldOutLoss | Ranking | Retrieval, template: str, home: Path
) -> None:
    tiny = spec.tiny()
    result = tiny.run(pipeline(template), home)
    assert all(
        name.startswith(f"{spec.name}.") and np.isfinite(v) for name, v in result.metrics.items()
    )
    assert tiny.run(pipeline(template), home).metrics == result.metrics
    assert len(open_dataset(str(home / "datasets" / "synthetic-shapes"))) >= tiny.rows


@pytest.mark.parametrize("spec", EVALS, ids=lambda spec: spec.name)
def test_specs_are_values(spec: HeldOutLoss | Ranking | Retrieval) -> None:
    assert from_dict(to_dict(spec)) == spec
    assert override(spec, flat(spec)) == spec
    assert override(spec, {"name": "other", "rows": "40"}).rows == 40


def test_invalid_numbers_are_rejected() -> None:
    with pytest.raises(SpecError, match=r"ranking\.candidates: .*expected 2 to rows"):
        Ranking(dataset=DATASET, rows=10, candidates=11)
    for spec in (HeldOutLoss, Retrieval):
        with pytest.raises(SpecError, match="expected at least 2"):
            spec(dataset=DATASET, rows=1)
