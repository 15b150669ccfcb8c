"""Answering loss against one plain forward per answer, and the release's own sum."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bridgework.data.collate import Batch, collate
from bridgework.data.dataset import write
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import shapes
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import DataError, SpecError
from bridgework.losses import Answering
from bridgework.models import base
from bridgework.models.base import Outputs
from bridgework.models.blip_med import MED
from bridgework.system import IGNORE, Stage, load
from bridgework.training.engine import Engine
from bridgework.training.step import TrainingModule

ANSWERS = (("red",) * 6 + ("dark red",) * 3 + ("rose",), ("two",) * 10, (), ("7", "", "7", " "))
LOSS = Answering(label_smoothing=0.1, alone=0.2)


def asked(key: str, image: bytes, answers: tuple[str, ...]) -> Sample:
    said = (
        Part("user", image=0),
        Part("user", text=f"\nWhat is it, {key}?"),
        Part("assistant", text="mine"),
    )
    return Sample(key, (image,), said, labels=answers)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """BLIP's fine-tune at a tiny size, over four questions with ten, ten, no and four answers."""
    path = str(tmp_path_factory.mktemp("vqa") / "questions")
    rows = [
        asked(f"q{i}", s.images[0], own)
        for (i, s), own in zip(enumerate(shapes(4)), ANSWERS, strict=True)
    ]
    write(rows, path, source="test", license="CC0-1.0", made_by="test", group_rows=4, shard_rows=4)
    tiny = load("blip:vqa").tiny()["vqa"]
    sources = (replace(tiny.data.sources[0], dataset=path),)
    model = replace(tiny.model, text=replace(tiny.model.text, dropout=0.0))
    return replace(
        tiny, model=model, data=replace(tiny.data, sources=sources), evals=(), losses=(LOSS,)
    )


@pytest.fixture(scope="module")
def batch(stage: Stage, home: Path) -> Batch:
    rows = next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0))
    return collate(rows, pad_id=257)


def model_of(stage: Stage) -> MED:
    torch.manual_seed(0)
    model: MED = stage.model.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_a_row_carries_every_answer_once_with_the_share_of_those_who_gave_it(
    stage: Stage, batch: Batch
) -> None:
    assert (
        batch.answers_AN is not None
        and batch.answer_owner_A is not None
        and batch.answer_weight_A is not None
    )
    expected = {
        "q0": {"red": 0.6, "dark red": 0.3, "rose": 0.1},
        "q1": {"two": 1.0},
        "q2": {"mine": 0.2},  # one answer, as of Visual Genome
        "q3": {"7": 1.0},  # blank answers are none
    }
    for place, key in enumerate(batch.keys):
        own = batch.answer_owner_A == place
        texts = [bytes_of(ids[ids != IGNORE]) for ids in batch.answers_AN[own]]
        found = dict(zip(texts, batch.answer_weight_A[own].tolist(), strict=True))
        assert found == pytest.approx(expected[key])


def bytes_of(ids: Tensor) -> str:
    text = load_tokenizer("bytes").decode(ids.tolist())
    assert text.endswith("<|im_end|>")
    return text.removesuffix("<|im_end|>").strip()


def test_the_loss_is_the_weighted_sum_of_a_plain_forward_for_each_answer(
    stage: Stage, batch: Batch
) -> None:
    """Sum over answers of weight times the sum of its tokens' losses, over the questions (blip_vqa.py)."""
    model = model_of(stage)
    with torch.no_grad():
        outputs = model(**batch.inputs(), requested=frozenset({"answers"}))
        sums_B = LOSS(outputs)
    assert LOSS.count(batch.labels_BT).tolist() == [1.0] * len(batch.keys)
    expected_B = torch.zeros(len(batch.keys))
    assert (
        batch.answers_AN is not None
        and batch.answer_owner_A is not None
        and batch.answer_weight_A is not None
    )
    rows = zip(
        batch.answers_AN, batch.answer_owner_A.tolist(), batch.answer_weight_A.tolist(), strict=True
    )
    for answer_N, owner, weight in rows:
        ids, labels = batch.ids_BT[owner], batch.labels_BT[owner]
        question = ids[: int((labels != IGNORE).int().argmax())]
        answer = answer_N[answer_N != IGNORE]
        row_1T = torch.cat([question, answer]).unsqueeze(0)
        target_1T = torch.cat([torch.full_like(question, IGNORE), answer]).unsqueeze(0)
        assert batch.pixels_N3HW is not None
        with torch.no_grad():
            pixels = batch.pixels_N3HW[owner : owner + 1]
            logits_1TV = model(row_1T, torch.ones_like(row_1T).bool(), target_1T, pixels).logits_BTV
        nats = cross_entropy(
            logits_1TV[0, :-1].float(),
            target_1T[0, 1:],
            reduction="sum",
            ignore_index=IGNORE,
            label_smoothing=0.1,
        )
        expected_B[owner] += weight * nats
    torch.testing.assert_close(sums_B, expected_B, rtol=1e-4, atol=1e-4)


def test_question_is_encoded_once_for_all_its_answers(stage: Stage, batch: Batch) -> None:
    model = model_of(stage)
    read: list[int] = []
    model.text.register_forward_hook(
        lambda module, args, output: read.append(len(output.last_hidden_state))
    )
    with torch.no_grad():
        model(**batch.inputs(), requested=frozenset({"answers"}))
    assert read == [len(batch.keys)]


@pytest.mark.usefixtures("process_group")
def test_a_step_is_the_mean_over_questions_however_the_batch_is_cut(
    stage: Stage, home: Path
) -> None:
    rows = next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0))
    taken = []
    for micro in (8, 3):
        torch.manual_seed(stage.seed)
        model = stage.model.build()
        cut = replace(stage, budget=replace(stage.budget, micro=micro))
        engine = Engine(
            TrainingModule(model, stage.losses), cut, base.set_trainable(model, stage.trains)
        )
        batches = [collate(rows[i : i + micro], pad_id=257) for i in range(0, len(rows), micro)]
        taken.append(engine.train_step(batches, 0.0))
    torch.testing.assert_close(taken[0].losses_L, taken[1].losses_L, rtol=1e-5, atol=1e-5)
    assert taken[0].norm == pytest.approx(taken[1].norm, rel=1e-3)
    mean = taken[0].sums_LR.sum() / len(rows)
    torch.testing.assert_close(taken[0].losses_L[0], mean, rtol=1e-5, atol=1e-5)


def test_the_recipe_weighs_answers_as_its_release() -> None:
    stage = load("blip:vqa")["vqa"]
    assert stage.losses == (Answering(label_smoothing=0.1, alone=0.2),)
    learning = base.set_trainable(stage.tiny().model.build(), stage.trains)
    assert {name.split(".")[0] for name in learning} == {"vision", "text", "decoder", "heads"}


def test_missing_outputs_and_values_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="ask the wiring for 'answers'"):
        LOSS(Outputs())
    with pytest.raises(SpecError, match="must be above 0, got 0"):
        Answering(alone=0.0)
    with pytest.raises(SpecError, match=r"out of range\. Got 1; expected a number in \[0, 1\)"):
        Answering(label_smoothing=1.0)
