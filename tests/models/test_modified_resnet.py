"""CLIP's ResNet against plain torch, and its published sizes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward

from bridgework.errors import SpecError, WeightsError
from bridgework.models import ModifiedResNetConfig, base
from bridgework.models.clip_resnet import AttentionPool, Bottleneck, Network
from bridgework.models.vision import normalize
from tests.models.examples import pixels

TINY = ModifiedResNetConfig().tiny()


@pytest.mark.parametrize(
    ("config", "parameters"),
    [  # of openai/CLIP's visual towers
        (ModifiedResNetConfig(), 38_316_896),
        (ModifiedResNetConfig(layers=(3, 4, 23, 3), pool=512), 56_259_936),
    ],
    ids=["RN50", "RN101"],
)
def test_the_published_towers_have_their_sizes(
    config: ModifiedResNetConfig, parameters: int
) -> None:
    with torch.device("meta"):
        tower = config.build()
    assert sum(p.numel() for p in tower.parameters()) == parameters
    assert all(p.is_meta for p in tower.parameters())


def test_the_pool_is_torch_attention_whose_query_is_the_mean() -> None:
    torch.manual_seed(0)
    pool, cells = AttentionPool(cells=9, channels=32, heads=4, out=10), torch.randn(2, 9, 32)
    for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        nn.init.normal_(projection.bias)
    tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1) + pool.positional_embedding
    along = tokens.transpose(0, 1)
    expected, _ = multi_head_attention_forward(
        along[:1], along, along, 32, 4, None,
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    torch.testing.assert_close(pool(cells), expected.transpose(0, 1))


def test_stride_is_a_mean_and_new_block_is_the_identity() -> None:
    torch.manual_seed(0)
    same, narrower = Bottleneck(32, 8, stride=1).eval(), Bottleneck(16, 8, stride=2).eval()
    images = torch.randn(2, 32, 6, 6)
    torch.testing.assert_close(same(images), images.relu())  # the last norm begins at zero
    images = torch.randn(2, 16, 6, 6)
    means = images.unflatten(2, (3, 2)).unflatten(4, (3, 2)).mean((3, 5))
    convolution: Tensor = narrower.downsample.get_parameter("0.weight")
    expected = torch.einsum("nchw,dc->ndhw", means, convolution[:, :, 0, 0]) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(narrower(images), expected.relu())


@pytest.mark.parametrize("select", ["pool", "patch"])
def test_tokens_and_width_match_the_towers_output(select: str) -> None:
    config = replace(TINY, select=select)
    features = config.build().eval()(pixels(2, size=64))
    assert (
        features.shape
        == (2, config.tokens, config.feature_width)
        == (2, *((1, 32) if select == "pool" else (4, 256)))
    )


def test_a_shifted_cell_is_seen_at_its_place() -> None:
    """Tokens are the cells of the map, row by row."""
    tower, images = replace(TINY, select="patch").build().eval(), pixels(1, size=64)
    network = tower.tower
    assert isinstance(network, Network)
    maps = network.map(normalize(images, tower.config.pixels))
    torch.testing.assert_close(
        tower(images)[0], torch.stack([maps[0, :, i, j] for i in (0, 1) for j in (0, 1)])
    )


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("prefix", ["", "visual."], ids=["tower", "whole model"])
def test_weights_come_back_by_the_names_of_the_release(
    kind: str, prefix: str, tmp_path: Path
) -> None:
    saved = TINY.build()
    state = {prefix + name: tensor for name, tensor in saved.tower.state_dict().items()}
    assert (
        prefix + "layer1.0.downsample.0.weight" in state
        and prefix + "attnpool.positional_embedding" in state
    )
    state |= {"logit_scale": torch.zeros(())} if prefix else {}
    file = tmp_path / f"rn.{kind}"
    save_file(state, file) if kind == "safetensors" else torch.save(state, file)
    loaded = replace(TINY, weights=str(file)).build()
    for name, tensor in saved.tower.state_dict().items():
        assert torch.equal(loaded.tower.state_dict()[name], tensor), name
    with pytest.raises(WeightsError, match=r"do not fit vision\.layers"):
        replace(TINY, layers=(1, 2, 1, 1), weights=str(file)).build()


def test_batch_statistics_rest_while_the_tower_is_frozen() -> None:
    tower = nn.ModuleDict({"vision": TINY.build(), "head": nn.Linear(2, 2)})
    base.set_trainable(tower, {"head.*": 1.0})
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    base.set_eval(tower.train())
    tower["vision"](pixels(2, size=64))
    assert all(torch.equal(buffer, before[name]) for name, buffer in tower.named_buffers())


@pytest.mark.parametrize(
    ("changes", "message"), [({"image_size": 230}, "multiple of 32"), ({"width": 7}, "even")]
)
def test_numbers_that_make_no_tower_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(TINY, **changes)
