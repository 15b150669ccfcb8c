"""The pipeline over the systems with a Q-Former: candidates are judged as in training, and answers are written."""

import numpy as np
import pytest
import torch
from PIL import Image

from bridgework.data.samples import Part
from bridgework.inference.pipeline import Pipeline
from bridgework.system import load
from tests.models.examples import stirred

CANDIDATES = ["a red circle", "a dog", "two very small blue squares", "cat"]
QUESTION = "What is in the picture?"
SYSTEMS = {
    "instructblip": "instruct",
    "instructblip:vicuna_7b": "instruct",
    "blip2": "generate",
    "minigpt4": "polish",
}


def pipeline(system: str, stage: str) -> Pipeline:
    found = load(system).tiny()[stage]
    torch.manual_seed(0)
    return Pipeline(stirred(found.model.build()).eval(), found)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize(("system", "stage"), SYSTEMS.items())
def test_candidate_likelihood_matches_training_in_any_batch(system: str, stage: str) -> None:
    pipe = pipeline(system, stage)
    together = pipe.log_likelihoods(picture(), CANDIDATES, QUESTION)
    shuffled = pipe.log_likelihoods(picture(), CANDIDATES[::-1], QUESTION)
    alone = torch.cat(
        [pipe.log_likelihoods(picture(), [candidate], QUESTION) for candidate in CANDIDATES]
    )
    shown = [Part("user", image=0), Part("user", text="\n" + QUESTION)]
    answered = [[*shown, Part("assistant", text=candidate)] for candidate in CANDIDATES]
    scored = torch.tensor(
        [score.loglik for score in pipe.scores(answered, [[picture()]] * len(CANDIDATES))]
    )
    for other in (shuffled.flip(0), alone, scored):
        torch.testing.assert_close(together, other, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("aware", [True, False])
def test_the_question_reaches_the_queries_only_where_they_hear_it(aware: bool) -> None:
    pipe = pipeline("instructblip" if aware else "instructblip:without_instruction", "instruct")
    features = pipe.inputs.features([picture()])
    asked = [
        pipe.inputs.batch(
            [[Part("user", image=0), Part("user", text=text)]], [features], answer=False
        )
        for text in ("What is it?", "Where is this?")
    ]
    seen = [
        pipe.model.images(
            None,
            features,
            batch.inputs().get("instruction"),
            batch.inputs().get("instruction_attention"),
        )
        for batch in asked
    ]
    assert torch.equal(seen[0], seen[1]) != aware


@pytest.mark.parametrize(("system", "stage"), SYSTEMS.items())
def test_an_answer_is_written_and_depends_on_the_image(system: str, stage: str) -> None:
    pipe = pipeline(system, stage)
    conversation = [Part("user", image=0), Part("user", text=QUESTION)]
    first, again, other = (
        pipe.generate(conversation, [picture(seed)], max_new_tokens=6, temperature=1.0, seed=3)
        for seed in (0, 0, 5)
    )
    assert first == again and 1 <= first.completion_tokens <= 6
    log_likelihoods = [pipe.log_likelihoods(picture(seed), CANDIDATES, QUESTION) for seed in (0, 5)]
    assert not torch.allclose(*log_likelihoods) and other.completion_tokens >= 1


def test_first_stage_retrieves_and_matches_pairs() -> None:
    pipe = pipeline("blip2", "represent")
    images, texts = pipe.embed_images([picture(0), picture(1)]), pipe.embed_texts(CANDIDATES[:2])
    assert images.shape == (2, 4, 16) and texts.shape == (2, 16)
    judged = pipe.match([picture(0), picture(1)], CANDIDATES[:2])
    assert judged.shape == (2,) and judged[0] != judged[1]
