"""CLIP's text tower against transformers, and the tokens that a text's vector depends on."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.models import CLIPTextConfig
from bridgework.models.clip_text import CLIPText

TINY = replace(CLIPTextConfig().tiny(), context=12)
EOS = 259


def build(config: CLIPTextConfig = TINY) -> CLIPText:
    torch.manual_seed(0)
    tower = config.build()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower.eval()


def texts() -> tuple[Tensor, Tensor]:
    """Two texts, of 9 and 6 tokens, padded on the right with the end, as CLIP's tokenizer does."""
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[0, 8], ids[1, 5:] = EOS, EOS
    attention = torch.ones(2, 9, dtype=torch.bool)
    attention[1, 6:] = False
    return ids, attention


@pytest.mark.parametrize("eos", [EOS, 2], ids=["first end", "largest id"])
def test_a_text_is_the_pooled_output_of_transformers(eos: int) -> None:
    tower, (ids, attention) = build(replace(TINY, eos=eos)), texts()
    theirs: Any = tower.tower
    torch.testing.assert_close(
        tower(ids, attention), theirs(ids, attention_mask=attention.long()).pooler_output
    )


def test_ids_after_the_end_do_not_matter_and_every_id_before_it_does() -> None:
    tower, (ids, attention) = build(), texts()
    feature = tower(ids, attention)[1]
    behind = ids.clone()
    behind[1, 6:] = torch.tensor([7, 8, 9])
    torch.testing.assert_close(tower(behind, attention)[1], feature)
    for place in range(6):
        changed = ids.clone()
        changed[1, place] = (changed[1, place] + 1) % 256
        assert not torch.allclose(tower(changed, attention)[1], feature, atol=1e-4), place


def test_no_token_sees_later_ones() -> None:
    tower, (ids, attention) = build(), texts()
    hidden = tower.tower(ids[:1], attention_mask=attention[:1].long()).last_hidden_state
    for place in range(1, 9):
        changed = ids[:1].clone()
        changed[0, place:] = (changed[0, place:] + 1) % 256
        other = tower.tower(changed, attention_mask=attention[:1].long()).last_hidden_state
        torch.testing.assert_close(other[:, :place], hidden[:, :place])


def test_padding_on_the_left_changes_no_text() -> None:
    tower, (ids, attention) = build(), texts()
    left, real = ids.roll(3, 1)[1:], attention.roll(3, 1)[1:]
    torch.testing.assert_close(tower(left, real), tower(ids, attention)[1:])


def test_new_weights_have_the_spreads_of_the_release() -> None:
    """Standard deviations of q, k, v and the output projection are openai/CLIP's, unlike transformers'."""
    config = CLIPTextConfig(depth=2, vocab=1000, eos=999)
    torch.manual_seed(0)
    tower: Any = config.build().tower
    block, width = tower.encoder.layers[0], config.width
    deep = width**-0.5 * (2 * config.depth) ** -0.5
    spreads = {
        tower.embeddings.token_embedding: 0.02,
        tower.embeddings.position_embedding: 0.01,
        block.self_attn.q_proj: width**-0.5,
        block.self_attn.v_proj: width**-0.5,
        block.self_attn.out_proj: deep,
        block.mlp.fc1: (2 * width) ** -0.5,
        block.mlp.fc2: deep,
    }
    for module, spread in spreads.items():
        assert math.isclose(module.weight.detach().std(), spread, rel_tol=0.05), module


@pytest.mark.parametrize("whole", [False, True], ids=["tower", "whole model"])
def test_saved_weights_come_back_from_a_tower_and_from_the_model_around_it(
    whole: bool, tmp_path: Path
) -> None:
    saved = build()
    around: Any = saved.tower
    if whole:
        vision = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        config = transformers.CLIPConfig(text_config=around.config.to_dict(), vision_config=vision)
        model: Any = transformers.CLIPModel(config)
        model.text_model, around = around, model
    around.save_pretrained(tmp_path)
    loaded = replace(TINY, weights=str(tmp_path)).build().eval()
    torch.testing.assert_close(loaded(*texts()), saved(*texts()))
    with pytest.raises(
        WeightsError, match=r"width 32 \(config 64\), act quick_gelu \(config gelu\)"
    ):
        replace(TINY, width=64, act="gelu", weights=str(tmp_path)).build()


def test_a_text_that_is_too_long_and_numbers_that_make_no_tower_are_refused() -> None:
    with pytest.raises(DataError, match="reads 12 tokens, got 13"):
        build()(torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 13, dtype=torch.bool))
    with pytest.raises(SpecError, match=r"text\.width 512 must be a multiple of text\.heads 7"):
        CLIPTextConfig(heads=7)
