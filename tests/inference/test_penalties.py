"""Length and repetition penalties, held against transformers' own search and against a loop by hand."""

import pytest
import torch
from transformers import GenerationConfig

from bridgework.config import from_dict, override, to_dict
from bridgework.data.samples import Part
from bridgework.data.synthetic import shapes
from bridgework.errors import SpecError
from bridgework.evaluation import Captions, Writing
from bridgework.inference.generation import Sampling
from bridgework.inference.pipeline import Pipeline
from tests.inference import tiny

IMAGE = next(shapes(1)).images[0]
ASKED = [Part("user", image=0), Part("user", text="What is shown?")]


def letters(ending: float) -> Pipeline:
    """Writes letters and blanks, and ends its answers as often as the bias of the endings makes it."""
    made = tiny.pipeline(prompts=())
    allowed = {*made.tokenizer("abcdefghijklmnopqrstuvwxyz ").input_ids, *made.stop_conditions.ids}
    bias_V = torch.tensor([0.0 if token in allowed else -1e4 for token in range(320)])
    bias_V[list(made.stop_conditions.ids)] = ending
    made.model.language.lm_head.register_forward_hook(lambda module, args, output: output + bias_V)
    return made


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return letters(ending=1.2)


@pytest.fixture(scope="module")
def endless() -> Pipeline:
    return letters(ending=-1e4)


def searched(pipe: Pipeline, penalty: float) -> str:
    """The same search by transformers alone, on the prompt's embeddings."""
    batch = pipe.inputs.batch([ASKED], [[IMAGE]], answer=False)
    config = GenerationConfig(
        max_new_tokens=20, num_beams=5, length_penalty=penalty, do_sample=False,
        eos_token_id=sorted(pipe.stop_conditions.ids), pad_token_id=pipe.tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.no_grad():
        embeds_1TD = pipe.model.embed(batch.ids_BT, None, batch.features_NPD)
        ids = pipe.model.language.generate(
            inputs_embeds=embeds_1TD,
            attention_mask=batch.attention_BT.long(),
            generation_config=config,
        )[0].tolist()
    kept = [
        token
        for token in ids
        if token not in pipe.stop_conditions.ids and token != pipe.tokenizer.pad_token_id
    ]
    return str(pipe.tokenizer.decode(kept)).lstrip()


def test_a_length_penalty_ranks_beams_as_transformers_search_does(pipe: Pipeline) -> None:
    answers = {}
    for penalty in (-1.0, 1.0, 3.0):
        answers[penalty] = pipe.generate(
            ASKED, [IMAGE], max_new_tokens=20, beams=5, length_penalty=penalty
        ).text
        assert answers[penalty] == searched(pipe, penalty)
    assert len(answers[-1.0]) < len(answers[3.0])
    assert pipe.generate(ASKED, [IMAGE], max_new_tokens=20, beams=5).text == answers[1.0]


def repelled(pipe: Pipeline, penalty: float, steps: int) -> str:
    """Greedy by hand: a logit of a token that was written is divided by the penalty, or multiplied below 0 (CTRL)."""
    batch = pipe.inputs.batch([ASKED], [[IMAGE]], answer=False)
    ids_1T, new = batch.ids_BT, list[int]()
    for _ in range(steps):
        with torch.no_grad():
            given = {
                "ids": ids_1T,
                "attention": torch.ones_like(ids_1T).bool(),
                "features": batch.features_NPD,
            }
            logits_V = pipe.model(**given).logits_BTV[0, -1]
        for token in set(new):
            logits_V[token] = (
                logits_V[token] / penalty if logits_V[token] > 0 else logits_V[token] * penalty
            )
        new.append(int(logits_V.argmax()))
        if new[-1] in pipe.stop_conditions.ids:
            new.pop()
            break
        ids_1T = torch.cat([ids_1T, torch.tensor([new[-1:]])], dim=1)
    return str(pipe.tokenizer.decode(new)).lstrip()


def test_repetition_penalty_matches_ctrl_over_generated_tokens(endless: Pipeline) -> None:
    plain, repelling = (
        endless.generate(ASKED, [IMAGE], max_new_tokens=16, repetition_penalty=penalty).text
        for penalty in (1.0, 1.5)
    )
    assert plain == repelled(endless, 1.0, 16) and repelling == repelled(endless, 1.5, 16)
    assert len(plain) >= 12 and plain != repelling
    written = endless.generate_batch(
        [ASKED] * 2, [[IMAGE]] * 2, [0, 1], max_new_tokens=16, repetition_penalty=1.5
    )
    assert written == [repelling] * 2


def test_an_evaluation_writes_with_its_penalties(pipe: Pipeline, endless: Pipeline) -> None:
    short = Writing(beams=5, least=0, most=20, length_penalty=-1.0)
    assert short.run(pipe, [ASKED], [[IMAGE]]) == [searched(pipe, -1.0)]
    greedy = Writing(beams=1, least=0, most=16, repetition_penalty=1.5)
    assert greedy.run(endless, [ASKED], [[IMAGE]]) == [repelled(endless, 1.5, 16)]
    spec = override(
        Captions(dataset="x"), {"writing.length_penalty": "-1", "writing.repetition_penalty": "1.2"}
    )
    assert from_dict(to_dict(spec)) == spec and spec.tiny().writing.length_penalty == -1.0
    assert "length_penalty" not in to_dict(Writing())


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(length_penalty=-1.0), "ranks the beams of a search. Got -1 with beams=1"),
        (Sampling(length_penalty=float("nan"), beams=2), "is a finite number"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty is above 0"),
        (Sampling(repetition_penalty=float("inf")), "repetition_penalty is above 0"),
    ],
)
def test_a_penalty_that_would_do_nothing_or_harm_is_refused(
    pipe: Pipeline, sampling: Sampling, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        pipe.generate(ASKED, [IMAGE], **sampling)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beams": 1, "length_penalty": -1.0}, "ranks the beams"),
        ({"top_p": 0.9, "length_penalty": -1.0}, "ranks the beams"),
        ({"repetition_penalty": -1.0}, "is above 0"),
    ],
)
def test_so_it_is_in_a_recipe(fields: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Writing(**fields)
