"""Classification by a head against a loop, and linear probes against scikit-learn and Newton's optimum in torch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bridgework.config import flat, from_dict, override, to_dict
from bridgework.data.dataset import write
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, SpecError
from bridgework.evaluation import Classification, LinearProbe, ZeroShot
from bridgework.evaluation.base import draw_images
from bridgework.inference.pipeline import Pipeline
from bridgework.mixture import SHAPE_LABELS
from bridgework.system import load
from tests.inference import tiny

DATASET = "synthetic:shapes"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    stage = load("clip:linear_probe").tiny()["probe"]
    torch.manual_seed(0)
    model = stage.model.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Pipeline(model.eval(), stage)


def test_top_is_the_share_of_images_one_of_whose_labels_has_the_largest_logit(
    pipe: Pipeline, home: Path
) -> None:
    spec = Classification(dataset=DATASET, rows=70, seed=4)
    metrics = spec.run(pipe, home).metrics
    items = draw_images(spec, pipe, home, lambda sample: bool(sample.labels))
    hits, counts = {1: 0, 5: 0}, dict.fromkeys(SHAPE_LABELS, 0)
    for item in items:
        order = pipe.classify([item.squares[0]])[0].argsort(descending=True).tolist()
        for cut in hits:
            hits[cut] += bool({SHAPE_LABELS[c] for c in order[:cut]} & set(item.sample.labels))
        for label in set(item.sample.labels):
            counts[label] += 1
    sure = [pipe.classify([item.squares[0]])[0].softmax(-1).max().item() for item in items]
    assert metrics == {
        "classification.top1": pytest.approx(hits[1] / 70),
        "classification.top5": pytest.approx(hits[5] / 70),
        # the logits are all in one bin
        "classification.ece": pytest.approx(abs(hits[1] / 70 - np.mean(sure)), abs=0.1),
        "classification.most_common": pytest.approx(max(counts.values()) / 70),
        "classification.unknown": 0.0,
    }


def test_rows_of_other_classes_are_counted_and_left_out(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    rows = [
        *shapes(6),
        *(replace(s, key=f"x-{i}", labels=("a zebra",)) for i, s in enumerate(shapes(2))),
    ]
    write(rows, str(tmp_path / "mixed"), source="test", license="CC0-1.0", made_by="test")
    metrics = Classification(dataset=str(tmp_path / "mixed")).run(pipe, home).metrics
    assert metrics["classification.unknown"] == pytest.approx(2 / 8)
    write(rows[6:], str(tmp_path / "zebras"), source="test", license="CC0-1.0", made_by="test")
    with pytest.raises(
        DataError, match=r"no row of .* has a label that is one of the stage's classes"
    ):
        Classification(dataset=str(tmp_path / "zebras")).run(pipe, home)


def test_images_with_labels_alone_are_classified_too(home: Path, tmp_path: Path) -> None:
    """ImageNet's rows have no caption: zero-shot classification reads them like a trained head does."""
    bare = [replace(sample, parts=sample.parts[:1]) for sample in shapes(8)]
    write(bare, str(tmp_path / "bare"), source="test", license="CC0-1.0", made_by="test")
    stage = load("clip").tiny()["contrast"]
    clip = Pipeline(stage.model.build().eval(), stage)
    assert ZeroShot(dataset=str(tmp_path / "bare")).run(clip, home).metrics["zero_shot.top5"] >= 0


def test_a_probe_is_scikit_learns_of_the_towers_features(pipe: Pipeline, home: Path) -> None:
    spec = LinearProbe(dataset=DATASET, rows=40, train_rows=120, strengths=(0.5,), seed=1)
    metrics = spec.run(pipe, home).metrics
    items = draw_images(replace(spec, rows=160), pipe, home, lambda sample: bool(sample.labels))
    judged, learned = items[:40], items[40:]
    seen = [
        np.asarray(pipe.inputs.features([item.squares[0] for item in rows]).double().mean(1))
        for rows in (learned, judged)
    ]
    labels = [item.sample.labels[0] for item in learned]
    probe = LogisticRegression(C=2.0, max_iter=1000).fit(seen[0], labels)
    said = probe.predict(seen[1])
    expected = np.mean(
        [name in item.sample.labels for name, item in zip(said, judged, strict=True)]
    )
    assert metrics["linear_probe.top1"] == pytest.approx(expected)
    assert metrics["linear_probe.strength"] == 0.5


def test_probe_penalty_is_half_the_squared_weights_plus_the_sum_of_losses() -> None:
    """The optimum of the documented objective, found by torch alone."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    truth = (
        seen[:, 0] + 0.5 * torch.randn(60, generator=generator, dtype=torch.float64) > 0
    ).long()
    third = (seen[:, 1] > 0.8).long() * 2
    truth = torch.where(third > 0, third, truth)
    labels = [f"class {int(i)}" for i in truth]
    strength = 0.7
    probe = LinearProbe(dataset="x")._fit(seen.numpy(), labels, strength)
    weight = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        nats = torch.nn.functional.cross_entropy(seen @ weight.T + bias, truth, reduction="sum")
        loss = nats + strength * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    shares = torch.softmax((seen @ weight.T + bias).detach(), dim=1)
    np.testing.assert_allclose(probe.predict_proba(seen.numpy()), shares.numpy(), atol=2e-3)


def test_the_strength_that_does_best_on_held_out_rows_is_taken(pipe: Pipeline, home: Path) -> None:
    strong = (
        LinearProbe(dataset=DATASET, rows=20, train_rows=100, strengths=(1e6, 1e-2))
        .run(pipe, home)
        .metrics
    )
    assert strong["linear_probe.strength"] in (1e6, 1e-2)
    flat_out = (
        LinearProbe(dataset=DATASET, rows=20, train_rows=100, strengths=(1e9,))
        .run(pipe, home)
        .metrics
    )
    assert flat_out["linear_probe.top1"] == pytest.approx(flat_out["linear_probe.most_common"])


def test_any_tower_can_be_probed_and_other_data_learned_from(home: Path) -> None:
    spec = LinearProbe(dataset=DATASET, train=DATASET, rows=16, train_rows=48, strengths=(1.0,))
    assert spec.datasets == (DATASET, DATASET)
    assert set(spec.run(tiny.pipeline(), home).metrics) == {
        "linear_probe.top1", "linear_probe.most_common", "linear_probe.strength",
    }  # fmt: skip


def test_training_rows_of_one_class_raise(pipe: Pipeline, home: Path, tmp_path: Path) -> None:
    rows = [replace(sample, labels=("thing",)) for sample in shapes(8)]
    write(rows, str(tmp_path / "one"), source="test", license="CC0-1.0", made_by="test")
    with pytest.raises(DataError, match="have one class, 'thing'"):
        LinearProbe(dataset=str(tmp_path / "one")).run(pipe, home)


@pytest.mark.parametrize("spec", [Classification(dataset=DATASET), LinearProbe(dataset=DATASET)])
def test_specs_are_values_and_tiny_ones_run(
    spec: Classification | LinearProbe, pipe: Pipeline, home: Path
) -> None:
    assert from_dict(to_dict(spec)) == spec and override(spec, flat(spec)) == spec
    assert spec.tiny().run(pipe, home).metrics == spec.tiny().run(pipe, home).metrics


def test_invalid_numbers_are_rejected() -> None:
    with pytest.raises(SpecError, match="at least 1"):
        Classification(dataset="x", rows=0)
    for fields in (
        {"validation": 1.0},
        {"strengths": ()},
        {"strengths": (0.0,)},
        {"train_rows": 1},
    ):
        with pytest.raises(SpecError):
            LinearProbe(dataset="x", **fields)
