"""The classifier wiring: against plain torch and transformers, what trains of it, and its data path."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPVisionModel
from typer.testing import CliRunner

from bridgework import artifacts, cli
from bridgework.config import override
from bridgework.data.collate import Batch, collate
from bridgework.data.dataset import write
from bridgework.data.preview import read
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import DataError, SpecError
from bridgework.evaluation import Classification as Judge
from bridgework.inference.pipeline import Pipeline
from bridgework.losses import Classification
from bridgework.mixture import SHAPE_LABELS
from bridgework.models import EfficientNetConfig, ImageClassifierConfig, ModifiedResNetConfig, base
from bridgework.models.vision import normalize
from bridgework.recipes import clip
from bridgework.system import IGNORE, Stage, System, load
from bridgework.training.step import TrainingModule
from tests.training.support import go, weights

STAGES = {"linear_probe": "probe", "fine_tune": "classify"}


def tiny(variant: str) -> Stage:
    return load(f"clip:{variant}").tiny()[STAGES[variant]]


def batch(stage: Stage, home: Path) -> Batch:
    return collate(next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0)


def test_logits_and_loss_are_plain_torchs_on_transformers_tower(home: Path) -> None:
    stage = tiny("fine_tune")
    torch.manual_seed(0)
    model = stage.model.build().eval()
    given = batch(stage, home)
    tower = CLIPVisionModel(model.vision.tower.config).eval()
    tower.load_state_dict(model.vision.tower.state_dict())
    assert given.pixels_N3HW is not None
    with torch.no_grad():
        pooled = tower(pixel_values=normalize(given.pixels_N3HW, stage.model.pixels)).pooler_output
        expected = nn.functional.linear(pooled, model.head.weight, model.head.bias)
        outputs = model(**given.inputs())
    torch.testing.assert_close(outputs.classes_BC, expected, rtol=1e-4, atol=1e-5)
    for smoothing in (0.0, 0.1):
        loss = Classification(label_smoothing=smoothing)
        theirs = nn.functional.cross_entropy(
            expected, given.labels_BT[:, 0], label_smoothing=smoothing
        )
        ours = loss(outputs).sum() / loss.count(given.labels_BT).sum()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_is_its_label_and_of_several_one_is_drawn(home: Path) -> None:
    stage = tiny("linear_probe")
    given = batch(stage, home)
    labels = {sample.key: sample.labels for sample in shapes()}
    for key, ids, target in zip(given.keys, given.ids_BT, given.labels_BT, strict=True):
        assert ids.tolist() == target.tolist() and len(ids) == 1
        assert SHAPE_LABELS[int(target)] in labels[key]
    rows = [
        row
        for rows in local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)
        for row in rows
    ]
    assert any(SHAPE_LABELS[row.labels[0]] == labels[row.key][1] for row in rows)
    assert any(SHAPE_LABELS[row.labels[0]] == labels[row.key][0] for row in rows)


def test_exactly_the_head_learns_in_a_probe_and_the_tower_too_in_a_fine_tune(home: Path) -> None:
    probe, whole = tiny("linear_probe"), tiny("fine_tune")
    assert set(base.set_trainable(probe.model.build(), probe.trains)) == {
        "head.weight",
        "head.bias",
    }
    model = whole.model.build()
    learning = base.set_trainable(model, whole.trains)
    assert set(learning) == {name for name, _ in model.named_parameters()} and set(
        learning.values()
    ) == {1.0}
    for stage, parts in ((probe, {"head"}), (whole, {"head", "vision"})):
        torch.manual_seed(0)
        model = stage.model.build()
        base.set_trainable(model.train(), stage.trains)
        assert model.vision.training == ("vision" in parts)
        TrainingModule(model, stage.losses)(batch(stage, home)).sum().backward()
        moved = {
            name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert {name.split(".")[0] for name in moved} == parts


def test_a_classifier_starts_from_the_contrast_stages_image_tower(
    home: Path, tmp_path: Path
) -> None:
    system = load("clip:linear_probe").tiny()
    torch.manual_seed(1)
    contrast = system["contrast"].model.build()
    artifacts.save(
        tmp_path / "contrast", dict(contrast.named_parameters()), system=system, stage="contrast"
    )
    stage = system["probe"]
    given = artifacts.weights(tmp_path / "contrast", stage.init_params)
    assert {name.split(".")[0] for name in given} == {"vision"}
    model = stage.model.build()
    artifacts.load_into(model, given, "contrast")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model.eval().vision(pixels), contrast.eval().vision(pixels))


@pytest.mark.parametrize("variant", STAGES)
def test_a_tiny_classifier_learns_eight_images_by_heart(
    variant: str, home: Path, run: str, tmp_path: Path
) -> None:
    """The complete program through the loop, from the contrastive stage to the artifact and its evaluations."""
    name, path = STAGES[variant], str(tmp_path / "eight")
    rows = [replace(sample, labels=SHAPE_LABELS[i : i + 1]) for i, sample in enumerate(shapes(8))]
    write(rows, path, source="test", license="CC0-1.0", made_by="test")
    tiny_system = load(f"clip:{variant}").tiny()
    faster = {f"stages.{name}.optim.peak_lr": 3e-2 if variant == "linear_probe" else 3e-3,
              "stages.contrast.budget.steps": 2, f"stages.{name}.budget.steps": 100,
              f"stages.{name}.data.sources.cifar10.dataset": path}  # fmt: skip
    contrast, stage = override(tiny_system, faster).stages
    evals = tuple(
        replace(judge, dataset=path, rows=8) for judge in stage.evals if isinstance(judge, Judge)
    )
    system = System(name=tiny_system.name, paper="", stages=(contrast, replace(stage, evals=evals)))
    results = go(system, home, run, stages=None)
    metrics = results[name].metrics
    assert (
        metrics["cifar10.top1"] == metrics["shifted.top1"] == 1.0 > metrics["cifar10.most_common"]
    )
    kept, before = weights(home, run, name), weights(home, run, "contrast")
    assert {key.split(".")[0] for key in kept} == {"head", "vision"}
    moved = {
        key
        for key, tensor in kept.items()
        if key in before and not torch.equal(tensor, before[key])
    }
    assert bool(moved) == (variant == "fine_tune") and all(
        key.startswith("vision.") for key in moved
    )
    pipe = Pipeline.load(str(results[name].artifact), "cpu")
    assert pipe.classes == SHAPE_LABELS
    assert [pipe.rank(row.images[0], SHAPE_LABELS)[0].candidate for row in rows] == list(
        SHAPE_LABELS[:8]
    )


def test_classes_are_ranked_and_named(home: Path) -> None:
    stage = tiny("linear_probe")
    torch.manual_seed(0)
    pipe = Pipeline(stage.model.build().eval(), stage)
    image = next(shapes(1)).images[0]
    logits_C = pipe.classify([image])[0]
    ranked = pipe.rank(image, SHAPE_LABELS)
    assert [r.candidate for r in ranked] == [
        SHAPE_LABELS[i] for i in logits_C.argsort(descending=True)
    ]
    few = pipe.rank_answers(pipe.inputs.about(), [image], ["red circle", "blue square"])
    assert {r.candidate: r.score for r in few} == pytest.approx(
        {name: float(logits_C[SHAPE_LABELS.index(name)]) for name in ("red circle", "blue square")}
    )
    with pytest.raises(DataError, match="'red cirle' is none of them; did you mean 'red circle'"):
        pipe.rank(image, ["red cirle", "blue square"])
    with pytest.raises(SpecError, match="reads no question, got 'Why\\?'"):
        pipe.rank(image, ["red circle", "blue square"], "Why?")
    with pytest.raises(SpecError, match="cannot write: its wiring is a ImageClassifier"):
        pipe.generate(pipe.inputs.about(), [image])


def test_a_classifier_is_asked_about_an_image_by_the_command_line(tmp_path: Path) -> None:
    system, stage = load("clip:linear_probe").tiny(), tiny("linear_probe")
    torch.manual_seed(0)
    model = stage.model.build().eval()
    artifacts.save(tmp_path / "model", model.state_dict(), system=system, stage="probe")
    (tmp_path / "shape.png").write_bytes(next(shapes(1)).images[0])
    asked = ["ask", str(tmp_path / "model"), "-i", str(tmp_path / "shape.png")]
    done = CliRunner().invoke(cli.app, asked)
    ranked = Pipeline(model, stage).rank(next(shapes(1)).images[0], SHAPE_LABELS)
    lines = [line.split() for line in done.output.splitlines()[1:]]
    assert [" ".join(line[:-1]) for line in lines] == [one.candidate for one in ranked]
    assert [float(line[-1]) for line in lines] == pytest.approx(
        [one.score for one in ranked], abs=0.006
    )
    few = CliRunner().invoke(cli.app, [*asked, "--choice", "red circle", "--choice", "blue square"])
    assert {line.rpartition(" ")[0].strip() for line in few.output.splitlines()[1:]} == {
        "red circle",
        "blue square",
    }


def test_labels_that_are_no_class_are_bad_rows_with_a_reason(home: Path, tmp_path: Path) -> None:
    image = next(shapes(1)).images[0]
    rows = [
        replace(pair("good", image, "x"), labels=("red circle",)),
        replace(pair("odd", image, "x"), labels=("red cirkle",)),
        pair("bare", image, "x"),
        Sample(
            "two",
            (image, image),
            (*pair("p", image, "x").parts, Part("caption", image=1)),
            labels=("red circle",),
        ),
    ]
    path = str(tmp_path / "labeled")
    write(rows, path, source="test", license="CC0-1.0", made_by="test")
    stage = tiny("linear_probe")
    stage = replace(
        stage, data=replace(stage.data, sources=(replace(stage.data.sources[0], dataset=path),))
    )
    problems = {preview.key: preview.problem for preview in read(stage, home)}
    assert problems["good"] == "" or problems["good"] is None
    assert "did you mean 'red circle'" in str(problems["odd"])
    assert "has no labels" in str(problems["bare"]) and "reads one image per sample. Got 2" in str(
        problems["two"]
    )


def test_a_preview_names_the_class(home: Path) -> None:
    for preview in read(tiny("linear_probe"), home, 3):
        assert "".join(span.text for span in preview.spans) in SHAPE_LABELS
    tokenizer = load_tokenizer(
        ImageClassifierConfig(vision=clip.VIT_B32, classes=("a b", "c")).tokenizer
    )
    assert (
        tokenizer("a b").input_ids == [0]
        and tokenizer.decode([1]) == "c"
        and tokenizer.pad_token_id == 2
    )


def test_the_classes_of_the_synthetic_pictures_are_all_of_their_labels() -> None:
    assert {label for sample in shapes() for label in sample.labels} <= set(SHAPE_LABELS)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="two or more different names"):
        ImageClassifierConfig(vision=clip.VIT_B32, classes=("cat", "cat"))
    with pytest.raises(SpecError, match="two or more different names"):
        ImageClassifierConfig(vision=clip.VIT_B32, classes=("cat",))
    with pytest.raises(SpecError, match="one vector an image, and vision gives 49"):
        ImageClassifierConfig(vision=replace(clip.VIT_B32, select="patch"), classes=("cat", "dog"))
    for vision in (ModifiedResNetConfig(), EfficientNetConfig(grid=1)):
        model = (
            ImageClassifierConfig(vision=vision, classes=("cat", "dog"))
            .tiny()
            .build(pretrained=False)
            .eval()
        )
        size = model.vision.config.pixels.size
        pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        ids = torch.zeros(2, 1, dtype=torch.long)
        assert model(ids, ids.bool(), pixels=pixels).classes_BC.shape == (2, len(SHAPE_LABELS))
        with pytest.raises(DataError, match="3 samples and 2 images"):
            model(torch.zeros(3, 1, dtype=torch.long), ids.bool(), pixels=pixels)
    labels = torch.tensor([[1], [IGNORE]])
    assert Classification().count(labels).tolist() == [1.0, 0.0]
