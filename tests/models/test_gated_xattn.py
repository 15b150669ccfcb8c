"""Gated cross-attention block: output, visibility and zero gates."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridgework.errors import SpecError
from bridgework.models.gated_cross_attention import GatedCrossAttentionBlock, GatesConfig

B, T, M, Q, F, D = 2, 6, 3, 4, 10, 16


def block(**changes: Any) -> GatedCrossAttentionBlock:
    torch.manual_seed(0)
    made = GatedCrossAttentionBlock(GatesConfig(heads=2, head_width=8, **changes), D, F)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_BTD, media_BMQF = (
        torch.randn(*s, generator=generator) for s in ((B, T, D), (B, M, Q, F))
    )
    return hidden_BTD, media_BMQF, torch.tensor([[0, 0, 1, 1, 2, 3], [1, 1, 1, 2, 2, 2]])


def test_the_block_is_the_papers_formula() -> None:
    made, (hidden_BTD, media_BMQF, seen_BT) = block(), example()
    given_BTD = hidden_BTD.clone()
    attention = nn.MultiheadAttention(D, 2, bias=False, kdim=F, vdim=F, batch_first=True)
    weights = zip("qkv", (made.query, made.key, made.value), strict=True)
    attention.load_state_dict(
        {f"{n}_proj_weight": m.weight for n, m in weights} | {"out_proj.weight": made.out.weight}
    )
    for row in range(B):
        for t in range(T):
            token_11D = made.norm(given_BTD[row : row + 1, t : t + 1])
            if image := int(seen_BT[row, t]):
                media_1QF = media_BMQF[row : row + 1, image - 1]
                given_BTD[row, t] += (
                    made.alpha.tanh() * attention(token_11D, media_1QF, media_1QF)[0][0, 0]
                )
    hidden = torch.relu(made.up(made.ffn_norm(given_BTD))).square()
    expected_BTD = given_BTD + made.ffn_alpha.tanh() * made.down(hidden)
    torch.testing.assert_close(
        made(hidden_BTD, media_BMQF, seen_BT), expected_BTD, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("alpha", ["scalar", "vector"])
def test_a_closed_gate_adds_nothing_and_still_learns(alpha: Any) -> None:
    made, (hidden_BTD, media_BMQF, seen_BT) = block(alpha=alpha), example()
    with torch.no_grad():
        made.alpha.zero_(), made.ffn_alpha.zero_()
    out_BTD = made(hidden_BTD, media_BMQF, seen_BT)
    assert torch.equal(out_BTD, hidden_BTD)
    out_BTD.square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == ("alpha" in name), name


def test_a_block_without_gates_adds_its_terms_as_they_are() -> None:
    made, open_, (hidden_BTD, media_BMQF, seen_BT) = block(alpha="none"), block(), example()
    assert not [name for name, _ in made.named_parameters() if "alpha" in name]
    with torch.no_grad():
        open_.alpha.fill_(20.0), open_.ffn_alpha.fill_(20.0)  # tanh(20) is 1 in float32
    open_.load_state_dict(made.state_dict(), strict=False)
    out_BTD = made(hidden_BTD, media_BMQF, seen_BT)
    torch.testing.assert_close(out_BTD, open_(hidden_BTD, media_BMQF, seen_BT))


def test_a_token_without_an_image_gets_exactly_nothing_from_attention() -> None:
    made, (hidden_BTD, media_BMQF, seen_BT) = block(), example()
    none_BT = torch.zeros_like(seen_BT)
    out_BTD = made(hidden_BTD, media_BMQF, none_BT)
    feed_forward_BTD = made.down(made.activation(made.up(made.ffn_norm(hidden_BTD))))
    assert torch.equal(out_BTD, hidden_BTD + made.ffn_alpha.tanh() * feed_forward_BTD)
    out_BTD.sum().backward()
    assert not made.key.weight.grad.any() and not made.query.weight.grad.any()


def test_an_image_is_seen_by_its_own_tokens_alone() -> None:
    made, (hidden_BTD, media_BMQF, seen_BT) = block(), example()
    before_BTD = made(hidden_BTD, media_BMQF, seen_BT)
    for image in range(M):
        other_BMQF = media_BMQF.clone()
        other_BMQF[:, image] += 1.0
        changed_BT = (made(hidden_BTD, other_BMQF, seen_BT) != before_BTD).any(-1)
        assert torch.equal(changed_BT, seen_BT == image + 1)


@pytest.mark.parametrize(
    ("depth", "every", "first", "layers"),
    [(24, 1, 0, 24), (40, 4, 0, 10), (80, 7, 0, 12), (32, 4, 3, 8), (30, 4, 3, 7)],
    ids=["3B", "9B", "80B", "open", "open, cut"],
)
def test_the_paper_has_ceil_and_openflamingo_floor_of_the_layers(
    depth: int, every: int, first: int, layers: int
) -> None:
    assert len(GatesConfig(every=every, first=first).layers(depth)) == layers


def test_flamingo_3b_adds_its_published_parameters() -> None:
    """1.2B in 24 blocks (table 5); the keys and values read the 1536 numbers of the resampler's tokens."""
    with torch.device("meta"):
        blocks = GatesConfig(every=1, heads=16).build(24, 2048, 1536)
    assert round(sum(p.numel() for p in blocks.parameters()) / 1e9, 1) == 1.2


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(SpecError, match=r"gates\.every"):
        GatesConfig(every=0)
    with pytest.raises(SpecError, match=r"gates\.first"):
        GatesConfig(first=-1)
