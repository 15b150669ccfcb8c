"""MiniGPT-4's page: one matrix of the published size trains, on pairs weighted 115 to 14."""

import math
from pathlib import Path

import pytest
import torch

from bridgework import artifacts
from bridgework.data.collate import collate
from bridgework.data.plan.shares import requested
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import Part
from bridgework.data.synthetic import shapes
from bridgework.data.tokenization import load_tokenizer
from bridgework.evaluation import CHAIR, VQA, MultipleChoice
from bridgework.inference.pipeline import Pipeline
from bridgework.models import base
from bridgework.recipes import minigpt4
from bridgework.system import IGNORE, IMAGE, Scoring, load
from bridgework.training.engine import learning_rate
from tests.recipes.test_blip2 import one_step

VARIANTS = {"minigpt4": 3_937_280, "minigpt4:without_qformer": 4 * 1408 * 4096 + 4096}


@pytest.mark.parametrize(("variant", "size"), VARIANTS.items())
def test_one_matrix_trains_and_the_artifact_holds_only_it(variant: str, size: int) -> None:
    for stage in load(variant).stages:
        with torch.device("meta"):
            model = stage.model.build(pretrained=False)
        learning = base.set_trainable(model, stage.trains)
        assert list(learning) == ["bridge.projection.weight", "bridge.projection.bias"]
        assert base.count(model).trainable == size
        assert artifacts.tensors_to_save(stage, model.state_dict(), learning, []) == list(learning)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["align", "polish"])
def test_one_tiny_step_updates_only_the_matrix(variant: str, name: str, home: Path) -> None:
    stage = load(variant).tiny()[name]
    assert one_step(stage, home) == {"bridge.projection.weight", "bridge.projection.bias"}


def test_image_follows_bos_and_the_caption_follows_the_image(home: Path) -> None:
    stage = load("minigpt4").tiny()["align"]
    batch = collate(next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0)
    places = stage.model.image_tokens
    assert bool((batch.ids_BT[:, 1 : 1 + places] == IMAGE).all()) and not bool(
        (batch.ids_BT[:, 0] == IMAGE).any()
    )
    assert bool((batch.labels_BT[:, 1 + places] != IGNORE).all())


def test_polish_has_the_published_prompts_and_answers_end_with_three_hashes(home: Path) -> None:
    stage = load("minigpt4").tiny()["polish"]
    batch = collate(next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0)
    tokenizer = load_tokenizer("bytes")
    row, labels = batch.ids_BT[0][batch.attention_BT[0]], batch.labels_BT[0][batch.attention_BT[0]]
    text = tokenizer.decode(row[row >= 0])
    assert "###Human: <Img></Img> " in text and " ###Assistant: " in text
    assert any(f"</Img> {instruction} ###" in text for instruction in minigpt4.INSTRUCTIONS)
    answer = tokenizer.decode(labels[labels != IGNORE])
    assert answer.endswith("###") and "Human" not in answer


@pytest.fixture(scope="module")
def overfitted() -> Pipeline:
    """Return a tiny MiniGPT-4 that is overfitted to one answer."""
    stage = load("minigpt4").tiny()["polish"]
    torch.manual_seed(0)
    pipe = Pipeline(stage.model.build(), stage)
    batch = pipe.inputs.batch(
        [[*ASKED, Part("assistant", text=ANSWER)]], [[IMAGE_FILE]], answer=True
    )
    optimizer = torch.optim.Adam(pipe.model.language.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = stage.losses[0](pipe.model(**batch.inputs())).sum()
        loss.backward()
        optimizer.step()
    pipe.model.eval()
    return pipe


IMAGE_FILE = next(shapes(1)).images[0]
ANSWER = "a red dog"
ASKED = [Part("user", image=0), Part("user", text="What is it?")]


def test_answer_stops_after_the_three_hashes(overfitted: Pipeline) -> None:
    answer = overfitted.generate(ASKED, [IMAGE_FILE], max_new_tokens=60)
    assert (answer.text, answer.finish_reason) == (ANSWER, "stop")
    assert answer.completion_tokens == len(f" {ANSWER}###")  # bytes
    assert (
        overfitted.generate_batch([ASKED] * 2, [[IMAGE_FILE]] * 2, [0, 1], max_new_tokens=60)
        == [ANSWER] * 2
    )
    assert "".join(overfitted.stream(ASKED, [IMAGE_FILE], max_new_tokens=60)) == ANSWER


def test_next_turn_continues_the_same_token_ids(overfitted: Pipeline) -> None:
    """The last prompt and answer are a prefix of the next prompt, so a prefix cache stays valid."""

    def read(parts: list[Part]) -> list[int]:
        ids: list[int] = (
            overfitted.inputs.batch([parts], [[IMAGE_FILE]], answer=False).ids_BT[0].tolist()
        )
        return ids

    before = read(ASKED)
    written = overfitted.tokenizer(f" {ANSWER}###", add_special_tokens=False).input_ids
    after = read([*ASKED, Part("assistant", text=ANSWER), Part("user", text="Where?")])
    assert after[: len(before) + len(written)] == before + written
    assert (
        overfitted.tokenizer.decode(after[len(before) + len(written) :])
        == "Human: Where? ###Assistant:"
    )


def test_image_is_32_tokens_or_64_without_the_qformer() -> None:
    places = [load(variant)["align"].model.image_tokens for variant in VARIANTS]
    assert places == [32, 64]


def test_pairs_are_weighted_115_to_14() -> None:
    data = load("minigpt4")["align"].data
    weights = requested(data, [source.rows or 0 for source in data.sources])
    assert float(weights[0] / weights[1]) == pytest.approx(115 / 14)


def test_learning_rate_matches_the_release() -> None:
    optim = load("minigpt4")["align"].optim
    rates = [learning_rate(optim, step, 20_000) for step in (0, 4_999, 5_000, 20_000)]
    assert rates == pytest.approx([1e-4 / 5_000, 1e-4, 1e-4, 8e-5])


def test_evals_are_choices_answers_and_hallucinated_objects(home: Path) -> None:
    stage = load("minigpt4")["polish"]
    assert [(judge.name, type(judge)) for judge in stage.evals] == [
        ("aokvqa", MultipleChoice), ("gqa", VQA), ("long", CHAIR), ("short", CHAIR)
    ]  # fmt: skip
    assert stage.scoring == Scoring(prior=False) and stage.evals[0].scoring is None
    tiny = load("minigpt4").tiny()["polish"]
    torch.manual_seed(0)
    pipe = Pipeline(tiny.model.build().eval(), tiny)
    for judge in tiny.evals:
        result = judge.run(pipe, home)
        assert {name.partition(".")[2] for name in result.metrics} == set(judge.better)
        assert all(math.isfinite(value) for value in result.metrics.values())
