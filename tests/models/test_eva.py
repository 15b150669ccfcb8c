"""EVA's ViT against transformers' tower of BLIP-2, whose LayerNorm is the bridge's here."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval, OPTConfig

from bridgework.errors import SpecError, WeightsError
from bridgework.models import ConcatConfig, EvaConfig
from bridgework.models.vision import normalize
from tests.models.examples import pixels, stirred

TINY = replace(EvaConfig().tiny(), depth=2)


def whole_blip2(folder: Path) -> Blip2ForImageTextRetrieval:
    config = Blip2Config(
        vision_config=TINY.config().to_dict(),
        qformer_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
        text_config=OPTConfig(
            hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2
        ).to_dict(),
    )
    model = stirred(Blip2ForImageTextRetrieval(config)).eval()
    model.save_pretrained(folder)
    return model


def test_vit_g_has_its_published_size_without_a_byte_of_memory() -> None:
    with torch.device("meta"):
        tower = EvaConfig().build(pretrained=False)
    assert sum(p.numel() for p in tower.parameters()) == 985_949_440
    assert (
        EvaConfig().tokens == 257
        and EvaConfig(select="patch").tokens == 256
        and EvaConfig().feature_width == 1408
    )


@pytest.mark.parametrize("select", ["all", "patch"])
def test_tower_of_a_complete_blip2_matches_transformers_without_the_bridges_norm(
    select: str, tmp_path: Path
) -> None:
    theirs = whole_blip2(tmp_path).vision_model
    ours = replace(TINY, select=select, weights=str(tmp_path)).build().eval()
    expected = theirs(normalize(pixels(2), ours.config.pixels)).last_hidden_state
    torch.testing.assert_close(
        theirs.post_layernorm(ours(pixels(2))), expected[:, int(select == "patch") :]
    )
    norm = ConcatConfig(group=1, weights=str(tmp_path)).build(32, 8).ln_vision
    torch.testing.assert_close(norm(ours(pixels(2))), expected[:, int(select == "patch") :])


def test_weights_of_another_image_size_get_positions_between_their_own(tmp_path: Path) -> None:
    theirs = whole_blip2(tmp_path).vision_model.embeddings
    tower = replace(TINY, image_size=48, weights=str(tmp_path)).build().tower
    expected = theirs.interpolate_pos_encoding(torch.zeros(1, 37, 32), 48, 48)
    torch.testing.assert_close(tower.get_parameter("embeddings.position_embedding"), expected)
    assert torch.equal(
        tower.get_parameter("embeddings.position_embedding")[:, 0], theirs.position_embedding[:, 0]
    )


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    whole_blip2(tmp_path)
    with pytest.raises(WeightsError, match=r"width 32 \(config 64\)"):
        replace(TINY, width=64, weights=str(tmp_path)).build()
    with pytest.raises(WeightsError, match=r"width 32 \(config 64\)"):
        ConcatConfig(weights=str(tmp_path)).build(64, 8)
    with pytest.raises(SpecError, match=r"width 30 must be a multiple of vision\.heads 16"):
        EvaConfig(width=30)
