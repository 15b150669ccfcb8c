"""Int8 weights: a quarter of the memory, and outputs close to those of the weights."""

import pytest
import torch
from torch import nn

from bridgework.errors import SpecError
from bridgework.inference.engine import Engine
from bridgework.inference.quantization import Int8Linear, quantize
from tests.inference import tiny


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_weights_are_off_by_half_a_step_at_most(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=bias).to(dtype)
    layer.weight.data[3] = 0  # an output that is always 0
    small = Int8Linear(layer)
    weight_OI = small.weight.float() * small.scale.float()[:, None]
    step_O1 = layer.weight.float().abs().amax(1, keepdim=True) / 127
    assert bool(((weight_OI - layer.weight.float()).abs() <= 0.501 * step_O1).all())
    inputs = torch.randn(5, 7, 64, dtype=dtype)
    expected, found = layer(inputs), small(inputs)
    assert found.dtype == dtype
    assert float((found - expected).abs().max()) < 0.03 * float(expected.abs().max())


@pytest.mark.parametrize(
    "name", ["llava/instruct", "blip2:flan_t5/generate", "flamingo/train", "xgen_mm/safety"]
)
def test_systems_answer_with_int8_weights(name: str) -> None:
    pipe = tiny.pipe_of(name)
    parts = pipe.inputs.about("What is it?")
    choices = ["a cat", "a dog", "two red birds"]
    expected = [score.loglik for score in pipe.score_answers(parts, [tiny.picture()], choices)]
    before, after = quantize(pipe.model)
    assert after < before
    found = [score.loglik for score in pipe.score_answers(parts, [tiny.picture()], choices)]
    assert found == pytest.approx(expected, rel=0.1) and found != expected
    alone = pipe.generate(parts, [tiny.picture()], max_new_tokens=8)
    engine = Engine(pipe)
    try:
        assert engine.generate(parts, [tiny.picture()], max_new_tokens=8) == alone
    finally:
        engine.close()


def test_model_without_a_language_model_is_refused() -> None:
    with pytest.raises(SpecError, match="int8: a MED has no language model"):
        quantize(tiny.pipe_of("blip/captioner").model)
