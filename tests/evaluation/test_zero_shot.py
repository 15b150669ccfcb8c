"""Zero-shot classification against a plain loop, and retrieval with several captions an image."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from bridgework.config import flat, from_dict, override, to_dict
from bridgework.data.dataset import write
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, SpecError
from bridgework.evaluation import Retrieval, ZeroShot
from bridgework.evaluation.base import draw, draw_pairs
from bridgework.evaluation.retrieval import similarity, within
from bridgework.evaluation.zero_shot import TEMPLATES, chance, class_vectors
from bridgework.inference.pipeline import Pipeline
from bridgework.recipes import clip

DATASET = "synthetic:shapes"


def recall(*scores: Any) -> float:
    """Return the share of rows with an own column within the cut."""
    return float(within(*scores).double().mean())


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    stage = clip.system().tiny()["contrast"]
    torch.manual_seed(0)
    model = stage.model.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Pipeline(model.eval(), stage)


def keep(tmp_path: Path, samples: list[Sample]) -> str:
    write(samples, str(tmp_path / "kept"), source="test", license="CC0-1.0", made_by="test")
    return str(tmp_path / "kept")


# --- zero-shot -------------------------------------------------------------------------------------------------------


def test_a_class_is_the_mean_of_its_prompts_at_length_one(pipe: Pipeline) -> None:
    vectors = class_vectors(pipe, ["cat", "dog"], TEMPLATES)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    for name, vector in zip(["cat", "dog"], vectors, strict=True):
        prompts = pipe.embed_texts([template.format(name) for template in TEMPLATES])
        torch.testing.assert_close(prompts.norm(dim=1), torch.ones(len(TEMPLATES)))
        torch.testing.assert_close(vector, normalize(prompts.mean(0), dim=0))
    torch.testing.assert_close(class_vectors(pipe, ["cat", "dog"], TEMPLATES[::-1]), vectors)
    torch.testing.assert_close(class_vectors(pipe, ["a cat"], ["{}"]), pipe.embed_texts(["a cat"]))


def test_top_is_the_share_of_images_whose_class_is_near(pipe: Pipeline, home: Path) -> None:
    spec = ZeroShot(dataset=DATASET, rows=30, seed=2)
    metrics = spec.run(pipe, home).metrics
    items = draw(spec, pipe, home)
    classes = sorted({label for item in items for label in item.sample.labels})
    vectors = class_vectors(pipe, classes, TEMPLATES)
    hits = {1: 0, 5: 0}
    for item in items:
        order = (
            (pipe.embed_images([item.squares[0]]) @ vectors.T)[0].argsort(descending=True).tolist()
        )
        for cut in hits:
            hits[cut] += bool({classes[c] for c in order[:cut]} & set(item.sample.labels))
    assert metrics["zero_shot.top1"] == pytest.approx(hits[1] / 30)
    assert metrics["zero_shot.top5"] == pytest.approx(hits[5] / 30)
    assert 0 < metrics["zero_shot.chance_top1"] < metrics["zero_shot.chance_top5"] < 1


def test_chance_is_that_of_drawing_classes_blindly() -> None:
    right = torch.tensor([[True, False, False, False], [True, True, False, False]])
    assert chance(right, 1) == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert chance(right, 2) == pytest.approx((2 / 4 + 5 / 6) / 2)
    assert chance(right, 9) == 1.0


def test_classes_may_be_given_and_rows_without_a_label_do_not_count(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    labeled = [replace(sample, labels=("thing",)) for sample in shapes(4)]
    bare = [replace(sample, key=f"bare-{i}", labels=()) for i, sample in enumerate(shapes(3))]
    path = keep(tmp_path, [*labeled, *bare])
    metrics = ZeroShot(dataset=path, classes=("thing", "other", "third")).run(pipe, home).metrics
    assert metrics["zero_shot.top5"] == 1.0 and metrics["zero_shot.chance_top1"] == pytest.approx(
        1 / 3
    )
    assert (
        ZeroShot(dataset=path, classes=("other", "third")).run(pipe, home).metrics["zero_shot.top5"]
        == 0.0
    )
    with pytest.raises(DataError, match=r"4 of the rows .* Got 1 classes"):
        ZeroShot(dataset=path).run(pipe, home)


def test_labeled_images_without_text_are_classified_too(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    said = [replace(sample, labels=(f"thing {i % 2}",)) for i, sample in enumerate(shapes(6))]
    bare = [replace(sample, parts=(Part("caption", image=0),)) for sample in said]
    told, silent = (
        ZeroShot(dataset=keep(tmp_path / name, rows))
        for name, rows in (("told", said), ("bare", bare))
    )
    assert told.run(pipe, home).metrics == silent.run(pipe, home).metrics


def test_tiny_runs_and_specs_are_values(pipe: Pipeline, home: Path) -> None:
    spec = clip.system()["contrast"].evals[0]
    assert isinstance(spec, ZeroShot)
    assert spec.tiny().run(pipe, home).metrics == spec.tiny().run(pipe, home).metrics
    assert from_dict(to_dict(spec)) == spec and override(spec, flat(spec)) == spec
    with pytest.raises(SpecError, match=r"must hold \{\} once"):
        ZeroShot(dataset=DATASET, templates=("a photo",))
    with pytest.raises(SpecError, match="templates is empty"):
        ZeroShot(dataset=DATASET, templates=())
    with pytest.raises(SpecError, match="expected at least 1"):
        ZeroShot(dataset=DATASET, rows=0)


# --- several captions an image ---------------------------------------------------------------------------------------


def test_any_own_column_counts_and_more_columns_do_not_reduce_recall() -> None:
    alike = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.3, 0.9, 0.5, 0.4], [0.7, 0.6, 0.5, 0.1]])
    own = torch.tensor(
        [[False, False, True, True], [True, True, False, False], [False, False, False, True]]
    )
    assert [recall(alike, cut, own) for cut in (1, 2, 3, 4)] == pytest.approx(
        [1 / 3, 2 / 3, 2 / 3, 1.0]
    )
    assert recall(alike, 4, torch.zeros(3, 4, dtype=torch.bool)) == 0.0
    random = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    theirs = torch.arange(30) // 3 == torch.arange(9).unsqueeze(1)
    shares = [recall(random, cut, theirs) for cut in range(1, 31)]
    assert shares == sorted(shares) and shares[-1] == 1.0
    loop = [
        any(c // 3 == row for c in random[row].argsort(descending=True)[:5].tolist())
        for row in range(9)
    ]
    assert recall(random, 5, theirs) == pytest.approx(sum(loop) / 9)


def test_an_image_with_several_captions_has_found_one_if_any(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    captions = [[f"{word} {i}" for word in ("one", "two", "three")] for i in range(6)]
    samples = [
        Sample(
            f"s{i}",
            sample.images,
            (Part("caption", image=0), *(Part("caption", text=t) for t in texts)),
        )
        for i, (sample, texts) in enumerate(zip(shapes(6), captions, strict=True))
    ]
    spec = Retrieval(dataset=keep(tmp_path, samples), rows=6)
    metrics = spec.run(pipe, home).metrics
    items = draw_pairs(spec, pipe, home, at_least=6, several=True)
    texts = [text for item in items for text in item.texts]
    assert len(texts) == 18
    alike = pipe.embed_images([item.squares[0] for item in items]) @ pipe.embed_texts(texts).T
    own = torch.arange(18) // 3 == torch.arange(6).unsqueeze(1)
    for cut in (1, 5, 10):
        assert metrics[f"retrieval.image_to_text_r{cut}"] == pytest.approx(recall(alike, cut, own))
        assert metrics[f"retrieval.text_to_image_r{cut}"] == pytest.approx(
            recall(alike.T, cut, own.T)
        )
    assert metrics["retrieval.chance_r1"] == pytest.approx(1 / 6)


def test_the_nearest_of_an_images_vectors_counts() -> None:
    images, texts = torch.randn(3, 4, 8), torch.randn(5, 8)
    expected = torch.stack(
        [torch.stack([(image @ text).max() for text in texts]) for image in images]
    )
    torch.testing.assert_close(similarity(images, texts), expected)
    torch.testing.assert_close(similarity(images[:, 0], texts), images[:, 0] @ texts.T)
