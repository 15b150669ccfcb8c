"""The language tower: built by numbers, loaded, and refused when the two disagree."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bridgework.errors import SpecError, WeightsError
from bridgework.models import LanguageConfig
from tests.models.examples import LLAMA_7B

TINY = LLAMA_7B.tiny()


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_arch_of_llamas_shape_builds_with_the_numbers_given(arch: str) -> None:
    config = replace(TINY, arch=arch, kv_heads=2, norm_eps=1e-6, rope_theta=5e5)
    model: Any = config.build()
    assert model.config.model_type == arch
    assert (model.config.hidden_size, model.config.num_key_value_heads, model.config.vocab_size) == (32, 2, 320)
    assert (model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]) == (1e-6, 5e5)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 320)


def test_an_unknown_arch_and_one_of_another_shape_are_refused() -> None:
    with pytest.raises(SpecError, match="no model type 'lama'"):
        replace(TINY, arch="lama").build()
    with pytest.raises(SpecError, match="'gpt2' is not of Llama's shape"):
        replace(TINY, arch="gpt2").build()


def test_smollm2_135m_has_its_published_size() -> None:
    config = LanguageConfig(
        width=576, depth=30, heads=9, kv_heads=3, ffn=1536, vocab=49_152, context=8192, tokenizer="bytes", tied=True
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build().parameters()) == 134_515_008


def test_saved_weights_come_back_and_a_shorter_context_may_be_taken(tmp_path: Path) -> None:
    saved = TINY.build()
    saved.save_pretrained(tmp_path)
    loaded = replace(TINY, weights=str(tmp_path), context=64).build()
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))
    assert next(loaded.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3, "vocab": 400}, r"depth 2 \(spec 3\), vocab 320 \(spec 400\)"),
        ({"context": 1024}, r"context 512 \(spec 1024\)"),
        ({"rope_theta": 5e5}, r"rope_theta 10000.0 \(spec 500000.0\)"),
        ({"tied": True}, r"tied False \(spec True\)"),
        ({"arch": "qwen2"}, r"arch llama \(spec qwen2\)"),
    ],
)
def test_weights_that_differ_from_the_spec_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    TINY.build().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=message):
        replace(TINY, weights=str(tmp_path), **changes).build()


def test_pretrained_false_draws_the_weights_anew(tmp_path: Path) -> None:
    saved = TINY.build()
    saved.save_pretrained(tmp_path)
    drawn = replace(TINY, weights=str(tmp_path)).build(pretrained=False)
    assert not torch.equal(next(saved.parameters()), next(drawn.parameters()))


@pytest.mark.parametrize(("kv_heads", "tiny"), [(32, 4), (8, 1), (16, 2)])
def test_tiny_keeps_the_grouping_of_key_value_heads(kv_heads: int, tiny: int) -> None:
    assert replace(LLAMA_7B, kv_heads=kv_heads).tiny().kv_heads == tiny


def test_tiny_of_smollm2_whose_nine_heads_share_three_builds() -> None:
    smol = replace(TINY, width=576, heads=9, kv_heads=3, ffn=1536)
    assert smol.tiny().build().config.num_key_value_heads == 1


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SpecError, match="heads of kv_heads 3"):
        replace(TINY, kv_heads=3)
