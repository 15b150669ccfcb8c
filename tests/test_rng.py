"""Positional random draws: equal for a sample on any rank, different for every other position."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgework import rng

PLACES = torch.tensor([3, 5, 8, 9])
OWNERS = torch.tensor([0, 0, 2, 3])  # the second sequence has no image, the first has two


def placed(places: Tensor = PLACES, owners: Tensor | None = None, step: int = 5) -> rng.Placed:
    owners = OWNERS if owners is None and len(places) == len(PLACES) else owners
    return rng.Placed(
        rng.derive(0, step), places, torch.zeros(0, dtype=torch.int64) if owners is None else owners
    )


def masks(rows: Tensor, shape: tuple[int, ...], calls: int = 2) -> list[Tensor]:
    with placed(rows, torch.zeros(0, dtype=torch.int64)):
        return [F.dropout(torch.ones(len(rows), *shape), 0.3) for _ in range(calls)]


@pytest.mark.parametrize("shape", [(7,), (6, 9), (2, 6, 6)])
def test_mask_of_a_sample_does_not_depend_on_the_split_of_the_batch(shape: tuple[int, ...]) -> None:
    whole = masks(PLACES, shape)
    for cut in (PLACES[:1], PLACES[1:3], PLACES[[3, 0]]):
        at = [PLACES.tolist().index(place) for place in cut.tolist()]
        for one, other in zip(masks(cut, shape), whole, strict=True):
            assert torch.equal(one, other[at])


def test_mask_of_a_token_does_not_depend_on_padding() -> None:
    narrow, wide = masks(PLACES, (5, 8), 1)[0], masks(PLACES, (11, 8), 1)[0]
    assert torch.equal(narrow, wide[:, :5])
    narrow, wide = masks(PLACES, (2, 5, 5), 1)[0], masks(PLACES, (2, 9, 9), 1)[0]
    assert torch.equal(narrow, wide[:, :, :5, :5])


def test_flattened_rows_are_still_rows() -> None:
    """OPT drops out (B * T, D), older attention (B * H, T, T)."""
    with placed():
        flat = F.dropout(torch.ones(4 * 6, 8), 0.3).view(4, 6, 8)
    with placed():
        plain = F.dropout(torch.ones(4, 6, 8), 0.3)
    assert torch.equal(flat, plain)


def test_another_call_step_position_or_row_has_other_draws() -> None:
    first, second = masks(PLACES, (64, 64))
    everything = [first, second, masks_of_step(6), masks(PLACES + 20, (64, 64), 1)[0]]
    rows = [row.flatten() > 0 for mask in everything for row in mask]
    for i, one in enumerate(rows):
        for other in rows[:i]:
            assert abs(float((one == other).float().mean()) - (0.7**2 + 0.3**2)) < 0.05


def masks_of_step(step: int) -> Tensor:
    with placed(step=step):
        return F.dropout(torch.ones(4, 64, 64), 0.3)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    with placed():
        dropped = F.dropout(torch.ones(4, 200, 501), p)
    assert float((dropped == 0).float().mean()) == pytest.approx(p, abs=0.005)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    assert len(dropped.unique()) == 2
    for axis in (1, 2):  # no row or column is favored
        assert float((dropped == 0).float().mean((0, axis)).std()) < 0.05


def test_dropout_at_its_ends_and_outside_of_training() -> None:
    given = torch.ones(4, 3)
    with placed():
        assert torch.equal(F.dropout(given, 0.0), given)
        assert torch.equal(F.dropout(given, 1.0), 0 * given)
        assert torch.equal(F.dropout(given, 0.5, training=False), given)
        assert torch.equal(nn.Dropout(0.5).eval()(given), given)
        assert F.dropout(torch.ones(4, 0, 3), 0.5).shape == (4, 0, 3)


def test_gradient_has_the_mask_of_the_values() -> None:
    given = torch.ones(4, 6, 5, requires_grad=True)
    with placed():
        dropped = nn.Dropout(0.4)(given)
    dropped.sum().backward()
    assert given.grad is not None and torch.equal(given.grad, dropped.detach())


def test_in_place_dropout_is_the_same() -> None:
    given = torch.ones(4, 6)
    with placed():
        F.dropout(given, 0.5, inplace=True)
    with placed():
        assert torch.equal(given, F.dropout(torch.ones(4, 6), 0.5))


def test_bfloat16_has_the_same_mask() -> None:
    with placed():
        half = F.dropout(torch.ones(4, 6, 8, dtype=torch.bfloat16), 0.3)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half == 0, masks(PLACES, (6, 8), 1)[0] == 0)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["bool", "float", "causal", "none", "nothing seen", "grouped", "scaled"]
)
def test_attention_matches_torch_except_for_the_dropout_mask(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(4, 2, 6, 8, generator=generator, requires_grad=True) for _ in range(3)
    )
    seen = torch.rand(4, 1, 6, 6, generator=generator) > 0.4
    seen[..., 0] = kind != "nothing seen"
    if kind == "nothing seen":
        seen[0] = False
    options: dict[str, Any] = {
        "bool": {"attn_mask": seen}, "nothing seen": {"attn_mask": seen}, "causal": {"is_causal": True}, "none": {},
        "float": {"attn_mask": torch.zeros(4, 1, 6, 6).masked_fill(~seen, -math.inf)}, "scaled": {"scale": 0.7},
        "grouped": {"enable_gqa": True},
    }[kind]  # fmt: skip
    if kind == "grouped":
        key, value = (t.detach()[:, :1].requires_grad_() for t in (key, value))
    monkeypatch.setattr(rng.Placed, "dropout", lambda self, given, p: given)
    with placed():
        own = F.scaled_dot_product_attention(query, key, value, dropout_p=0.3, **options)
    plain = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(own, plain)
    for of_own, of_plain in zip(
        torch.autograd.grad(own.sum(), (query, value)),
        torch.autograd.grad(plain.sum(), (query, value)),
        strict=True,
    ):
        torch.testing.assert_close(of_own, of_plain)


def test_dropout_inside_attention_depends_on_position() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 6, 8, generator=generator)
    with placed():
        whole = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    with placed(PLACES[1:3]):
        part = F.scaled_dot_product_attention(query[1:3], key[1:3], value[1:3], dropout_p=0.5)
    torch.testing.assert_close(part, whole[1:3])
    assert not torch.allclose(whole, F.scaled_dot_product_attention(query, key, value))


# --- rows that are not the sequences ---------------------------------------------------------------------------------


def test_rows_of_images_depend_on_sequence_and_index() -> None:
    with placed(), rng.images():
        whole = F.dropout(torch.ones(4, 32), 0.5)
    with placed(PLACES[:1], torch.tensor([0, 0])), rng.images():
        assert torch.equal(F.dropout(torch.ones(2, 32), 0.5), whole[:2])
    with placed(PLACES[2:], torch.tensor([0, 1])), rng.images():
        assert torch.equal(F.dropout(torch.ones(2, 32), 0.5), whole[2:])
    assert len({tuple(row.tolist()) for row in whole}) == 4


def test_a_batch_without_images_still_runs_its_tower() -> None:
    with placed(PLACES, torch.zeros(0, dtype=torch.int64)), rng.images():
        assert F.dropout(torch.ones(1, 8), 0.5).shape == (1, 8)


def test_repeated_rows_have_their_own_draws() -> None:
    with placed(), rng.repeated(3):
        whole = F.dropout(torch.ones(12, 64), 0.5).view(3, 4, 64)
    with placed(PLACES[1:2]), rng.repeated(3):
        one = F.dropout(torch.ones(3, 64), 0.5).view(3, 1, 64)
    assert torch.equal(one, whole[:, 1:2])
    assert len({tuple(row.tolist()) for row in whole.flatten(0, 1)}) == 12


def test_rows_without_position_are_dropped_out_and_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rng, "_reported", [])
    with placed():
        drawn = [F.dropout(torch.ones(7, 50), 0.5) for _ in range(2)]
    assert all(0.3 < float((each == 0).float().mean()) < 0.7 for each in drawn)
    assert caplog.text.count("dropout over 7 rows that are not those of the 4 samples") == 1


# --- other draws -----------------------------------------------------------------------------------------------------


def test_torch_rand_depends_on_position_if_it_has_rows_else_on_step() -> None:
    """Stochastic depth draws (B, 1, 1); layerdrop draws one number, the same on all ranks."""
    with placed():
        rows, one = torch.rand(4, 1, 1), torch.rand([])
    with placed(PLACES[2:]):
        assert torch.equal(torch.rand((2, 1, 1)), rows[2:])
        assert torch.equal(torch.rand([]), one)
    with placed(step=6):
        assert not torch.equal(torch.rand(4, 1, 1), rows) and not torch.equal(torch.rand([]), one)
    assert rows.dtype == torch.float32 and bool(((rows >= 0) & (rows < 1)).all())


def test_bernoulli_depends_on_position() -> None:
    with placed():
        whole = torch.empty(4, 100).bernoulli_(0.25)
    with placed(PLACES[1:2]):
        assert torch.equal(torch.empty(1, 100).bernoulli_(0.25), whole[1:2])
    assert float(whole.mean()) == pytest.approx(0.25, abs=0.08)


def test_explicit_generator_is_not_replaced() -> None:
    expected = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    with placed():
        assert torch.equal(torch.rand(4, 3, generator=torch.Generator().manual_seed(1)), expected)


def test_uniform_numbers_are_uniform() -> None:
    with placed():
        drawn = torch.rand(4, 5_000, dtype=torch.float64).flatten()
    counts = torch.histc(drawn, bins=20, min=0, max=1)
    assert float(((counts - 1_000) ** 2 / 1_000).sum()) < 50  # chi-squared, 19 degrees of freedom


def test_seeds_are_the_same_in_every_process() -> None:
    assert rng.derive(7, 123) == 9035632199557087122
    assert len({rng.derive(seed, step) for seed in range(30) for step in range(30)}) == 900


def test_seed_of_a_step_is_that_of_the_active_batch() -> None:
    torch.manual_seed(11)
    assert rng.step_seed() == 11
    with placed(step=9):
        assert rng.step_seed() == rng.derive(0, 9)
    assert rng.step_seed() == 11
