"""Perceiver resampler against transformers' own, and its invariances."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from bridgework.errors import DataError, SpecError
from bridgework.models.resampler import (
    Resampler,
    ResamplerConfig,
    frame_positions,
    interpolate_rows,
)

IDEFICS = {  # ours -> theirs, of one layer
    "media_norm": "0.context_layer_norm",
    "latent_norm": "0.latents_layer_norm",
    "query": "0.q_proj",
    "key": "0.k_proj",
    "value": "0.v_proj",
    "out": "0.output_proj",
    "ffn_norm": "1.ln",
    "up": "1.fc",
    "down": "1.c_proj",
}


def build(frames: int = 0, seed: int = 0, **changes: Any) -> Resampler:
    torch.manual_seed(seed)
    spec = ResamplerConfig(
        **{"latents": 4, "depth": 2, "heads": 2, "head_width": 8, "frames": frames} | changes
    )
    return spec.build(16, 24)


def patches(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))


def theirs_of(ours: Resampler) -> IdeficsPerceiverResampler:
    norms = {"qk_layer_norms_perceiver": ours.config.qk_norm}
    config = IdeficsConfig(vision_config={"embed_dim": 16}, perceiver_config=norms)
    theirs = IdeficsPerceiverResampler(config, 16, 2, 2, 8, 4)
    theirs.latents.data = ours.latents.data.clone()
    theirs.layer_norm.load_state_dict(ours.norm.state_dict())
    for i, layer in enumerate(ours.layers):
        for own, other in IDEFICS.items():
            theirs.get_submodule(f"blocks.{i}.{other}").load_state_dict(
                layer.get_submodule(own).state_dict()
            )
    return theirs


@pytest.mark.parametrize("qk_norm", [False, True])
def test_tokens_and_gradients_are_those_of_transformers_resampler(qk_norm: bool) -> None:
    ours = build(activation="relu", project=False, qk_norm=qk_norm)
    theirs, given = theirs_of(ours), patches(3, 9)
    mine, expected = ours(given), theirs(given)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    for tokens in (mine, expected):
        tokens.square().sum().backward()
    torch.testing.assert_close(ours.latents.grad, theirs.latents.grad, atol=1e-4, rtol=1e-4)
    for own, other in IDEFICS.items():
        name = next(n for n, _ in ours.layers[0].get_submodule(own).named_parameters())
        grads = (m.get_parameter(name).grad for m in (ours.layers[0].get_submodule(own),
                                                      theirs.get_submodule(f"blocks.0.{other}")))  # fmt: skip
        torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 9, 50])
def test_any_number_of_patches_gives_the_same_number_of_tokens(count: int) -> None:
    tokens = build()(patches(2, count))
    assert tokens.shape == (2, 4, 24) and tokens.isfinite().all()


def test_relu2_is_the_square_of_a_relu() -> None:
    layer: Any = build().layers[0]
    given = torch.tensor([-2.0, 0.5, 3.0])
    assert layer.activation(given).tolist() == [0.0, 0.25, 9.0]


def test_patches_of_a_frame_are_a_set() -> None:
    model, given = build(frames=3), patches(2, 3, 5)
    torch.testing.assert_close(
        model(given[:, :, torch.randperm(5)]), model(given), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("frames", [0, 3])
def test_the_order_of_frames_matters_only_where_they_have_positions(frames: int) -> None:
    model, given = build(frames=frames), patches(2, 3, 5)
    same = torch.allclose(model(given.flip(1)), model(given), atol=1e-5)
    assert same == (frames == 0)


def test_masked_patches_change_nothing_and_a_full_mask_equals_none() -> None:
    model, given = build(), patches(2, 6)
    real = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    other = given.masked_fill(~real.unsqueeze(-1), 7.0)
    torch.testing.assert_close(model(other, real), model(given, real), atol=0, rtol=0)
    torch.testing.assert_close(
        model(given[:1], real[:1]), model(given[:1, :4]), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        model(given, torch.ones_like(real)), model(given), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("frames", [0, 2, 5])
def test_videos_of_different_lengths_read_together_as_each_alone(frames: int) -> None:
    model, lengths = build(frames=frames), (1, 4, 2)
    given = patches(3, 4, 5)
    real = (torch.arange(4) < torch.tensor(lengths).unsqueeze(1)).unsqueeze(-1).expand(3, 4, 5)
    together = model(given, real)
    for one, own, length in zip(together, given, lengths, strict=True):
        torch.testing.assert_close(one, model(own[None, :length])[0], atol=1e-5, rtol=1e-5)


def test_thirty_frames_spread_over_eight_positions_and_eight_or_fewer_keep_theirs() -> None:
    learned = torch.randn(8, 3)
    thirty = interpolate_rows(learned, frame_positions(torch.tensor([30]), torch.arange(30), 8))[0]
    torch.testing.assert_close(thirty[[0, -1]], learned[[0, -1]])
    expected = torch.nn.functional.interpolate(
        learned.T[None], 30, mode="linear", align_corners=True
    )[0].T
    torch.testing.assert_close(thirty, expected, atol=1e-5, rtol=1e-5)
    for count in (1, 5, 8):
        assert torch.equal(
            interpolate_rows(
                learned, frame_positions(torch.tensor([count]), torch.arange(count), 8)
            )[0],
            learned[:count],
        )


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match=r"Got \(2, 5\); expected \(2, 6\)"):
        build()(patches(2, 6), torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("changes", "message"), [({"latents": 0}, "latents must be"), ({"frames": -1}, "frames must")]
)
def test_numbers_out_of_range_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build(**changes)
