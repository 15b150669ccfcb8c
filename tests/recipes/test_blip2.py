"""BLIP-2's page: trained parameters, weights passed between stages, and one tiny step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bridgework import artifacts
from bridgework.data.collate import collate
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.synthetic import shapes
from bridgework.data.tokenization import load_tokenizer
from bridgework.evaluation import VQA, Captions, Retrieval
from bridgework.models import base
from bridgework.models.qformer import is_text
from bridgework.recipes.blip2 import layerwise_rates
from bridgework.system import IMAGE, Stage, load
from bridgework.training.engine import learning_rate
from bridgework.training.step import TrainingModule
from tests.models.examples import pixels

VARIANTS = ("blip2", "blip2:flan_t5", "blip2:vqa", "blip2:caption", "blip2:retrieval")
STAGES = [(variant, stage.name) for variant in VARIANTS for stage in load(variant).stages]


def one_step(stage: Stage, home: Path) -> set[str]:
    """Return the names with a gradient after one step of the tiny stage on the real data path."""
    torch.manual_seed(0)
    model = stage.model.build()
    learning = base.set_trainable(model.train(), stage.trains)
    batch = collate(
        next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)),
        pad_id=load_tokenizer(stage.model.tokenizer).pad_token_id,
    )
    step = TrainingModule(model, stage.losses)
    sums_LS, counts_LS = step(batch), step.counts([batch])
    assert bool(torch.isfinite(sums_LS).all()) and bool((counts_LS.sum(1) > 0).all())
    assert bool((batch.ids_BT == IMAGE).any()) == bool(stage.model.image_tokens)
    (sums_LS.sum(1) / counts_LS.sum(1)).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved <= set(learning)
    return moved


def test_hyperparameters_match_the_paper() -> None:
    represent, generate = load("blip2").stages
    assert sum(source.rows or 0 for source in represent.data.sources) == pytest.approx(
        129e6, rel=0.01
    )
    assert (represent.budget.steps, represent.budget.batch) == (250_000, 1_680)
    assert (generate.budget.steps, generate.budget.batch) == (80_000, 1_920)
    assert load("blip2:flan_t5")["generate"].budget.batch == 1_520


@pytest.mark.parametrize(("variant", "name"), STAGES)
def test_one_tiny_step_updates_the_parts_that_train(variant: str, name: str, home: Path) -> None:
    moved = one_step(load(variant).tiny()[name], home)
    parts = {
        "represent": {"bridge", "heads"}, "generate": {"bridge"}, "vqa": {"bridge", "vision"},
        "caption": {"bridge", "vision"}, "retrieval": {"bridge", "heads", "vision"},
    }[name]  # fmt: skip
    assert {n.split(".")[0] for n in moved} == parts


def test_generate_starts_from_the_queries_of_represent(tmp_path: Path) -> None:
    system = load("blip2").tiny()
    trained = system["represent"].model.build().eval()
    artifacts.save(
        tmp_path / "represent", dict(trained.named_parameters()), system=system, stage="represent"
    )
    generate = system["generate"]
    given = artifacts.weights(tmp_path / "represent", generate.init_params)
    model = generate.model.build().eval()
    artifacts.load_into(model, given, "represent")
    patches = trained.vision(pixels(2))
    assert torch.equal(
        model.bridge.encode_image(patches)[-1], trained.bridge.encode_image(patches)[-1]
    )
    left = {
        n.removeprefix("bridge.")
        for n in dict(trained.named_parameters())
        if n.startswith("bridge.")
    } - {n.removeprefix("bridge.") for n in given}
    assert left == {n for n, _ in trained.bridge.named_parameters() if is_text(n)}


def test_learning_rate_decays_layer_by_layer() -> None:
    trains = layerwise_rates(39, 0.95)
    stage = load("blip2:vqa").tiny()["vqa"]
    learning = base.set_trainable(stage.model.build(), stage.trains)
    for i in range(39):
        assert trains[f"vision.tower.encoder.layers.{i}.*"] == pytest.approx(0.95 ** (39 - i))
        assert learning[f"vision.tower.encoder.layers.{i}.mlp.fc1.weight"] == pytest.approx(
            0.95 ** (39 - i)
        )
    assert learning["vision.tower.embeddings.class_embedding"] == pytest.approx(0.95**40)
    assert {n.split(".")[0] for n in learning} == {"vision", "bridge"} and learning[
        "bridge.queries"
    ] == 1.0


def test_learning_rate_warms_up_for_2000_steps_and_ends_at_the_papers() -> None:
    generate = load("blip2")["generate"]
    rates = [learning_rate(generate.optim, step, 80_000) for step in (0, 1_999, 2_000, 80_000)]
    assert rates == pytest.approx([1e-4 / 2_000, 1e-4, 1e-4, 5e-5])


def test_flan_t5_encodes_a_captions_prefix_and_decodes_the_rest(home: Path) -> None:
    """The split is random: the same caption is split at another word in another epoch."""
    stage = load("blip2:flan_t5").tiny()["generate"]
    batch = collate(next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0)
    begins = (batch.labels_BT >= 0).int().argmax(-1) - stage.model.image_tokens
    assert bool((begins > 1).all()) and len(set(begins.tolist())) > 1


def test_fine_tunes_train_exactly_bridge_and_vit() -> None:
    for variant, name, others in (
        ("caption", "caption", ()),
        ("retrieval", "retrieval", ("heads",)),
    ):
        stage = load(f"blip2:{variant}").tiny()[name]
        model = stage.model.build()
        learning = base.set_trainable(model, stage.trains)
        parts = ("bridge", "vision", *others)
        assert set(learning) == {n for n, _ in model.named_parameters() if n.split(".")[0] in parts}


def test_fine_tunes_match_tables_7_and_9() -> None:
    caption, retrieval = load("blip2:caption")["caption"], load("blip2:retrieval")["retrieval"]
    for stage, batch in ((caption, 256), (retrieval, 224)):
        epochs = stage.budget.steps * batch / 566_747  # pairs of COCO's Karpathy split
        assert stage.budget.batch == batch and epochs == pytest.approx(5, abs=0.01)
        assert stage.model.pixels.size == 364
        rates = [
            learning_rate(stage.optim, step, stage.budget.steps)
            for step in (0, 999, 1_000, stage.budget.steps)
        ]
        assert rates[:3] == pytest.approx([1e-8, 1e-5, 1e-5], rel=0.01) and rates[
            3
        ] == pytest.approx(0.0, abs=1e-9)
        assert (stage.optim.weight_decay, stage.optim.betas) == (0.05, (0.9, 0.999))
    assert caption.starts_from == "generate" and caption.data.sources[0].prompts == ("a photo of",)
    assert retrieval.starts_from == "represent" and retrieval.data.by_image
    assert retrieval.trains["vision.tower.encoder.layers.38.*"] == pytest.approx(0.95)
    for judge, dataset in zip(caption.evals, ("coco-karpathy-test", "nocaps-val"), strict=True):
        assert isinstance(judge, Captions) and judge.dataset == dataset
        assert (judge.writing.beams, judge.writing.least, judge.writing.most) == (5, 8, 30)
    assert {judge.rerank for judge in retrieval.evals if isinstance(judge, Retrieval)} == {128}


def test_caption_fine_tune_has_no_loss_on_its_prompt(home: Path) -> None:
    stage = load("blip2:caption").tiny()["caption"]
    batch = collate(next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0)
    tokenizer, captions = load_tokenizer("bytes"), {sample.key: sample.text for sample in shapes()}
    for key, ids, labels in zip(batch.keys, batch.ids_BT, batch.labels_BT, strict=True):
        assert tokenizer.decode([i for i in ids.tolist() if i >= 0]).count("a photo of") == 1
        answer = tokenizer.decode(labels[labels >= 0].tolist())
        assert "photo" not in answer and captions[key].strip() in answer


def test_retrieval_fine_tune_takes_all_captions_of_an_image_as_positives(home: Path) -> None:
    stage = load("blip2:retrieval").tiny()["retrieval"]
    batch = collate(next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0)
    assert batch.identity_B is not None
    torch.manual_seed(0)
    model = stage.model.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    step, first = TrainingModule(model, stage.losses[:1]), batch.identity_B[:1]
    one_image = replace(batch, identity_B=torch.cat([first, first, batch.identity_B[2:]]))
    with torch.no_grad():
        unknown, known, shared = (
            step(b)[0] for b in (replace(batch, identity_B=None), batch, one_image)
        )
    torch.testing.assert_close(unknown, known)  # every synthetic image has one caption
    assert not torch.allclose(known[:2], shared[:2]) and torch.allclose(known[2:], shared[2:])


def test_questions_are_answered_with_the_papers_length_penalty(home: Path) -> None:
    for variant in ("blip2", "blip2:flan_t5"):
        (judge,) = (e for e in load(variant)["generate"].evals if isinstance(e, VQA))
        assert (judge.writing.beams, judge.writing.length_penalty) == (5, -1.0)  # 4.1
