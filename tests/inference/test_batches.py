"""A batch of prompts of different lengths gives the answers of each prompt alone."""

import pytest

from bridgework.data.samples import Part
from tests.inference import tiny

NAMES = (
    "llava/instruct", "llava:next/instruct", "minigpt4/polish", "blip2:flan_t5/generate",
    "instructblip/instruct", "instructblip:vicuna_7b/instruct",
    "xgen_mm/instruct", "flamingo/train", "blip/captioner", "blip:vqa/vqa",
)  # fmt: skip
PROMPTS = ("", "who?", "which of the animals on the left is the largest one?", "is it red")


@pytest.mark.parametrize("name", NAMES)
def test_answers_do_not_depend_on_the_other_prompts_of_the_batch(name: str) -> None:
    pipe = tiny.pipe_of(name)
    image = tiny.picture()
    asked = [
        [Part("user", image=0), *([Part("user", text=f"\n{text}")] if text else [])]
        for text in PROMPTS
    ]
    options = {"max_new_tokens": 12, "temperature": 0.0}
    together = pipe.generate_batch(asked, [[image]] * len(asked), [0] * len(asked), **options)
    alone = [pipe.generate_batch([one], [[image]], [0], **options)[0] for one in asked]
    assert together == alone
    assert len(set(alone)) > 1  # the prompts matter
