"""BLIP's page: trained parameters, stages on their parents' weights, and the models' tasks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridgework import artifacts
from bridgework.config import override
from bridgework.data.collate import Batch, collate
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import pair
from bridgework.data.templates import conversation
from bridgework.data.tokenization import SampleEncoder
from bridgework.errors import SpecError
from bridgework.evaluation import Retrieval
from bridgework.inference.pipeline import Pipeline
from bridgework.losses import MomentumContrastive
from bridgework.models import base as freezing
from bridgework.models.blip_med import MED
from bridgework.recipes import blip
from bridgework.system import IGNORE, Stage, System, load, variants
from bridgework.training.step import TrainingModule
from tests.training.support import Stop, go, losses, same, stop_at, uncurated, weights

ORDER = ["pretrain", "captioner", "filter", "bootstrap"]


def batch(stage: Stage, home: Path) -> Batch:
    rows = next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0))
    return collate(rows, pad_id=257)


def stepped(stage: Stage, home: Path, parent: dict[str, Tensor] | None) -> MED:
    """Return the stage's model after one step from its parent's weights."""
    torch.manual_seed(0)
    model: MED = stage.model.build()
    if parent is not None:
        model.load_state_dict(model.adopt(parent), strict=False)
    learning = freezing.set_trainable(model, stage.trains)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step = TrainingModule(model, stage.losses).train()
    given = batch(stage, home)
    (step(given) / step.counts([given]).clamp(min=1)).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in learning), stage.name
    optimizer.step()
    model.after_step()
    return model


def saved(model: MED) -> dict[str, Tensor]:
    """Return the tensors that an artifact would hold."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("momentum.")
    }


@pytest.mark.parametrize("variant", variants("blip"))
def test_each_stage_trains_from_its_parents_weights(variant: str, home: Path) -> None:
    system = uncurated(load(f"blip:{variant}").tiny())
    left: dict[str, dict[str, Tensor]] = {}
    for stage in system.stages:
        model = stepped(stage, home, left.get(stage.starts_from or ""))
        left[stage.name] = saved(model)
    assert [s.name for s in system.stages][:4] == ORDER


def test_each_stage_trains_all_parameters_of_the_parts_its_tasks_need() -> None:
    parts = {
        "pretrain": {"vision", "text", "decoder", "heads"},
        "captioner": {"vision", "decoder", "heads"},
        "filter": {"vision", "text", "heads"},
        "bootstrap": {"vision", "text", "decoder", "heads"},
    }
    for stage in load("blip").stages:
        with torch.device("meta"):
            model = stage.model.build(pretrained=False)
        learning = freezing.set_trainable(model, stage.trains)
        assert set(learning) == {name for name, _ in model.named_parameters()}
        assert {name.split(".")[0] for name in learning} == parts[stage.name]


def test_hyperparameters_match_the_paper() -> None:
    base, large = load("blip"), load("blip:vit_l")
    for system, batch_size, rate in ((base, 2_880, 3e-4), (large, 2_400, 2e-4)):
        for name in ("pretrain", "bootstrap"):
            stage = system[name]
            assert (stage.budget.batch, stage.optim.peak_lr, stage.optim.weight_decay) == (
                batch_size,
                rate,
                0.05,
            )
            assert stage.model.pixels.size == 224 and stage.starts_from is None
            assert stage.model.momentum.queue == 57_600 and 57_600 % batch_size == 0
            epochs = stage.optim.final_lr / stage.optim.peak_lr
            assert epochs == pytest.approx(0.85**20)
        assert system["captioner"].starts_from == system["filter"].starts_from == "pretrain"
    pairs = sum(source.rows for source in base["pretrain"].data.sources)
    assert base["pretrain"].budget.steps == pytest.approx(20 * pairs / 2_880, rel=1e-3)
    images = 4 * 115_000_000 + 20 * pairs
    assert large["pretrain"].budget.steps == pytest.approx(images / 2_400, rel=1e-3)
    assert base["captioner"].budget.steps == pytest.approx(5 * 566_747 / 256, abs=1)
    assert base["filter"].budget.steps == pytest.approx(6 * 566_747 / 256, abs=1)


def test_bootstrap_trains_on_bootstrapped_and_human_captions() -> None:
    noisy, clean = (
        {s.dataset for s in load("blip")[name].data.sources} for name in ("pretrain", "bootstrap")
    )
    assert clean == {"coco-karpathy", "vg", "capfilt"} and noisy == {
        "coco-karpathy",
        "vg",
        *blip.WEB,
    }


def test_tiny_keeps_tasks_losses_and_templates() -> None:
    def choices(system: System) -> list[object]:
        return [
            (s.name, s.model.tasks, s.losses, s.data.template, dict(s.trains), s.starts_from)
            for s in system.stages
        ]

    for variant in variants("blip"):
        system = load(f"blip:{variant}")
        assert choices(system.tiny()) == choices(system)


def test_captioner_has_no_loss_on_its_prompt() -> None:
    stage = load("blip")["captioner"].tiny()
    streams = SampleEncoder.of(stage.model, stage.data)
    parts = conversation(pair("k", b"", "two cats"), ("a picture of",), 0)
    encoded = streams.train(parts)
    labeled = [i for i, label in zip(encoded.ids, encoded.labels, strict=True) if label != IGNORE]
    assert streams.tokenizer.decode(labeled) == " two cats<|im_end|>"
    assert streams.ask(parts).ids == encoded.ids[: len(streams.ask(parts).ids)]


@pytest.fixture
def bert() -> PreTrainedTokenizerFast:
    """Word-level tokenizer like BERT's: [CLS] and [SEP], neither bos nor eos."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "a",
        "picture",
        "of",
        "two",
        "cats",
        "how",
        "many",
        "?",
    ]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize(
    ("variant", "stage", "prompt", "row", "costs"),
    [
        ("system", "pretrain", None, "[CLS] two cats [SEP]", "two cats [SEP]"),
        (
            "system",
            "captioner",
            "a picture of",
            "[CLS] a picture of two cats [SEP]",
            "two cats [SEP]",
        ),
        ("vqa", "vqa", "how many cats?", "[CLS] how many cats? [SEP] two [SEP]", "two [SEP]"),
    ],
)
def test_rows_have_berts_layout(
    bert: PreTrainedTokenizerFast,
    variant: str,
    stage: str,
    prompt: str | None,
    row: str,
    costs: str,
) -> None:
    recipe_stage = load(f"blip:{variant}")[stage]
    text = costs.removesuffix(" [SEP]")
    parts = conversation(pair("k", b"", text), (prompt,) if prompt else (), 0)
    streams = SampleEncoder(recipe_stage.model, recipe_stage.data.template, 40, bert, None)
    encoded = streams.train(parts)

    def words(text: str) -> list[int]:
        return bert(text, add_special_tokens=False).input_ids

    assert encoded.ids == words(row) and [i for i in encoded.labels if i != IGNORE] == words(costs)
    asked = streams.ask(parts).ids
    assert asked == encoded.ids[: len(asked)] and len(asked) == len(encoded.ids) - len(words(costs))


@pytest.fixture(scope="module")
def retriever(home: Path) -> Pipeline:
    stage = load("blip")["filter"].tiny()
    return Pipeline(stepped(stage, home, None).eval(), stage)


def test_filter_embeds_matches_and_retrieves(retriever: Pipeline, home: Path) -> None:
    metrics = {}
    for rerank in (0, 4, 16):
        spec = Retrieval(dataset="synthetic:shapes", rows=16, rerank=rerank)
        metrics[rerank] = spec.run(retriever, home).metrics
        assert all(0 <= value <= 1 for value in metrics[rerank].values())
    assert metrics[0].keys() == metrics[4].keys()
    assert isinstance(retriever.model, MED)


def test_captioner_captions_an_image(home: Path) -> None:
    stage = load("blip")["captioner"].tiny()
    pipeline = Pipeline(stepped(stage, home, None).eval(), stage)
    image = next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0))[0].images[0]
    conversation_of_it = pipeline.inputs.ask(pair("k", b"", "unknown"))[:-1]
    written = pipeline.generate(
        conversation_of_it, [image], max_new_tokens=5, top_p=0.9, temperature=1.0, seed=0
    )
    again = pipeline.generate(
        conversation_of_it, [image], max_new_tokens=5, top_p=0.9, temperature=1.0, seed=0
    )
    assert written == again and written.completion_tokens == 5
    ranked = pipeline.rank(image, ["a red circle", "a blue square", "three dogs"])
    assert len(ranked) == 3 and ranked[0].score >= ranked[2].score


def test_a_task_that_the_model_lacks_is_an_error(retriever: Pipeline) -> None:
    stage = load("blip")["captioner"].tiny()
    writer = Pipeline(stage.model.build().eval(), stage)
    square = np.zeros((3, 32, 32), np.uint8)
    with pytest.raises(SpecError, match=r"needs match\. Got caption"):
        writer.match([square], ["a cat"])
    with pytest.raises(SpecError, match="this method needs contrast"):
        writer.embed_images([square])
    with pytest.raises(SpecError, match="needs caption or answer"):
        retriever.log_likelihoods(square, ["a cat"])


# Complete runs


def pretraining(steps: int, **changes: Any) -> System:
    stage = replace(load("blip")["pretrain"].tiny(), evals=())
    fast = {"budget.steps": steps, "optim.peak_lr": 1e-3, "model.momentum.queue": 16}
    stage = override(stage, fast | {path.replace("__", "."): new for path, new in changes.items()})
    return System(name="blip", paper="-", stages=(stage,))


def test_resumed_run_matches_unbroken_run_with_momentum_encoder_and_queue(home: Path) -> None:
    system = pretraining(5)
    go(system, home, "blip-unbroken", stages=None)
    with pytest.raises(Stop):
        go(
            system,
            home,
            "blip-resumed",
            stages=None,
            checkpoint_every=2,
            evaluate_every=1,
            report=stop_at(3),
        )
    go(system, home, "blip-resumed", stages=None, checkpoint_every=2)
    unbroken, resumed = (
        losses(home, name, "pretrain") for name in ("blip-unbroken", "blip-resumed")
    )
    assert dict(resumed) == dict(unbroken) and [step for step, _ in resumed][-3:] == [2, 3, 4]
    assert same(
        weights(home, "blip-unbroken", "pretrain"), weights(home, "blip-resumed", "pretrain")
    )


def test_artifact_has_no_momentum_encoder_and_loads(home: Path) -> None:
    go(pretraining(1), home, "blip-artifact", stages=None)
    folder = home / "runs/blip-artifact/pretrain/artifact"
    held = artifacts.weights(folder)
    assert not any(name.startswith("momentum.") for name in held)
    model = artifacts.load(folder).model
    momentum = model.momentum.averaged_parameters(torch.float32)
    assert all(torch.equal(tensor, held[name]) for name, tensor in momentum.items())


def test_fine_tune_starts_from_a_model_with_other_parts(home: Path) -> None:
    stages = tuple(replace(stage, evals=()) for stage in load("blip:vqa").tiny().stages)
    system = override(System(name="blip", paper="-", stages=stages), {"stages.*.budget.steps": 1})
    go(system, home, "blip-tuned", stages=None)
    folder = home / "runs/blip-tuned"
    left = {
        stage.name: set(artifacts.weights(folder / stage.name / "artifact")) for stage in stages
    }
    assert {name.split(".")[0] for name in left["captioner"]} == {"vision", "decoder", "heads"}
    assert {name.split(".")[0] for name in left["filter"]} == {"vision", "text", "heads"}
    assert (
        left["bootstrap"] == left["pretrain"] and "decoder.embeddings.LayerNorm.bias" in left["vqa"]
    )
    for stage in stages:
        artifacts.load(folder / stage.name / "artifact")


def test_contrast_over_micro_batches_matches_one_batch_with_the_queue(home: Path) -> None:
    taken = []
    for micro in (8, 3):
        run = f"blip-micro-{micro}"
        system = pretraining(
            3, losses=(MomentumContrastive(),), budget__micro=micro, model__text__dropout=0.0
        )
        go(system, home, run, stages=None)
        taken.append([loss for _, loss in losses(home, run, "pretrain")])
    assert taken[0] == pytest.approx(taken[1], rel=1e-4)


def test_bfloat16_trains(home: Path) -> None:
    go(pretraining(2, zero__precision="bf16"), home, "blip-bf16", stages=None, gpus_per_worker=0)
    assert all(torch.tensor(loss).isfinite() for _, loss in losses(home, "blip-bf16", "pretrain"))
