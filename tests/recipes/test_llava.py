"""LLaVA's page: image padding, and the fine-tune for ScienceQA."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bridgework.data.dataset import write
from bridgework.data.images import to_square
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import Part
from bridgework.data.synthetic import choices
from bridgework.data.tokenization import load_tokenizer
from bridgework.evaluation import WrittenChoice
from bridgework.inference.pipeline import Pipeline
from bridgework.models import base
from bridgework.models.vision import normalize
from bridgework.system import IGNORE, load
from tests.recipes.test_blip2 import one_step


@pytest.mark.parametrize("size", [(90, 60), (31, 80), (1, 300)])
def test_image_is_centered_and_padded_to_a_square_with_the_towers_zero(
    size: tuple[int, int],
) -> None:
    pixels = load("llava")["align"].model.pixels
    white = Image.new("RGB", size, "white")
    square = to_square(white, pixels)
    assert square.shape == (3, pixels.size, pixels.size)
    white_HW = (
        np.flatnonzero((square == 255).all(0).any(1)),
        np.flatnonzero((square == 255).all(0).any(0)),
    )
    for side, indices in zip(size[::-1], white_HW, strict=True):
        share = (indices[-1] - indices[0] + 1) / pixels.size
        assert abs(share - side / max(size)) <= 2 / pixels.size
        assert abs((indices[0] + indices[-1] + 1) / 2 - pixels.size / 2) <= 1  # centered
    border = (
        torch.from_numpy(square[:, :1, :1].copy())
        if size[0] > size[1]
        else torch.from_numpy(square[:, :, :1].copy())
    )
    seen = normalize(border.unsqueeze(0), pixels)
    limit = torch.tensor([1 / 255 / std for std in pixels.std]).view(1, 3, 1, 1)
    assert bool((seen.abs() <= limit).all())


def test_science_qa_starts_from_the_aligned_projector_and_answers_with_the_letter(
    home: Path, tmp_path: Path
) -> None:
    system = load("llava:science_qa")
    tune = system["science_qa"]
    assert [stage.name for stage in system.stages] == [
        "align",
        "science_qa",
    ] and tune.starts_from == "align"
    assert tune.trains == load("llava:v1")["instruct"].trains
    assert tune.budget.steps * tune.budget.batch == pytest.approx(
        12 * 12_726, rel=0.001
    )  # 12 epochs (5.2)
    (judge,) = tune.evals
    assert isinstance(judge, WrittenChoice) and judge.writing.beams == 1
    assert judge.prompts == tune.data.sources[0].prompts == ("{}\nOptions: {OPTIONS}",)
    tiny = system.tiny()["science_qa"]
    model = tiny.model.build()
    learning = base.set_trainable(model, tiny.trains)
    assert set(learning) == {
        n for n, _ in model.named_parameters() if n.split(".")[0] in ("bridge", "language")
    }
    question = next(choices(1))
    solved = replace(
        question,
        parts=(*question.parts[:2], Part("assistant", text="It is seen. The answer is B.")),
    )
    write([solved], str(tmp_path / "d"), source="test", license="CC0-1.0", made_by="test")
    source = replace(tiny.data.sources[0], dataset=str(tmp_path / "d"))
    stage = replace(
        tiny,
        data=replace(tiny.data, sources=(source,), lanes=1),
        budget=replace(tiny.budget, batch=1),
    )
    (row,) = next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0))
    tokenizer = load_tokenizer("bytes")
    read = tokenizer.decode([i for i in row.ids if i >= 0])
    assert all(
        f"({letter}) {text}" in read
        for letter, text in zip("ABCD", question.candidates, strict=True)
    )
    assert "The answer is B." in tokenizer.decode([i for i in row.labels if i != IGNORE])


def test_tiny_science_qa_trains_and_is_evaluated(home: Path) -> None:
    tiny = load("llava:science_qa").tiny()
    assert {name.split(".")[0] for name in one_step(tiny["science_qa"], home)} == {
        "bridge",
        "language",
    }
    torch.manual_seed(0)
    pipe = Pipeline(tiny["science_qa"].model.build().eval(), tiny["science_qa"])
    (judge,) = tiny["science_qa"].evals
    assert set(judge.run(pipe, home).metrics) == {
        "scienceqa.accuracy", "scienceqa.unanswered", "scienceqa.chance"
    }  # fmt: skip
