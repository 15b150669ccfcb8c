"""Hard negatives and matching loss against their definition, and over two ranks."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy, normalize

from bridgework.errors import DataError, SpecError
from bridgework.losses import Matching
from bridgework.losses.matching import (
    group_by_sample,
    hard_negatives,
    hash_uniform,
    matching,
    matching_pairs,
    nearest,
    positive_mask,
)
from bridgework.system import load

SPLIT = (3, 1)  # samples of each rank: the second has a negative elsewhere only


@dataclass
class Outputs:
    match_B3C: Tensor | None = None


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Four samples: ids whose first is 10 times the row, attention, image tokens of the row's number, vectors."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = 10 * torch.arange(4)[:, None] + torch.arange(5)
    attention_BT = torch.ones(4, 5, dtype=torch.bool)
    images_BPF = torch.arange(4, dtype=dtype)[:, None, None].expand(4, 3, 2).clone()
    image_BD, text_BD = normalize(
        torch.randn(2, 4, 6, generator=generator, dtype=dtype), dim=-1
    ).unbind()
    return ids_BT, attention_BT, images_BPF, image_BD, text_BD


def uniform(rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    return torch.rand(rows, columns, dtype=torch.float64, generator=generator)


def test_a_negative_is_never_a_rows_own() -> None:
    generator = torch.Generator().manual_seed(0)
    similar = torch.eye(5) * 50  # its own is by far the most similar
    drawn = torch.stack(
        [hard_negatives(similar, positive_mask(5, 5), uniform(5, 5, generator)) for _ in range(200)]
    )
    assert not (drawn == torch.arange(5)).any()
    assert all(set(column.tolist()) == set(range(5)) - {i} for i, column in enumerate(drawn.T))


def test_the_only_similar_candidate_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    similar = torch.full((4, 4), -torch.inf)
    similar[torch.arange(4), (torch.arange(4) + 1) % 4] = 0.0
    drawn = torch.stack(
        [hard_negatives(similar, positive_mask(4, 4), uniform(4, 4, generator)) for _ in range(500)]
    )
    assert (
        drawn == (torch.arange(4) + 1) % 4
    ).double().mean() > 0.995  # the floor of 1e-4 gives others a chance


def test_chances_are_the_softmax_with_its_floor() -> None:
    similar = torch.tensor([[9.0, 1.0, 0.0, 2.0]])
    chances = (similar.softmax(1) + 1e-4) * torch.tensor([0, 1, 1, 1])
    generator = torch.Generator().manual_seed(0)
    draws = uniform(20_000, 4, generator)
    drawn = hard_negatives(similar.expand(20_000, 4), positive_mask(1, 4).expand(20_000, 4), draws)
    torch.testing.assert_close(
        drawn.bincount(minlength=4) / 20_000, (chances / chances.sum())[0], atol=0.015, rtol=0.0
    )


def shares_of(similar: Tensor, own_bK: Tensor, floor: float, draws: int = 40_000) -> Tensor:
    """Return the share of draws of each candidate of one row."""
    generator = torch.Generator().manual_seed(0)
    spread = uniform(draws, similar.shape[1], generator)
    rows = similar.expand(draws, -1), own_bK.expand(draws, -1)
    return hard_negatives(*rows, spread, floor).bincount(minlength=similar.shape[1]) / draws


def test_without_a_floor_chances_are_the_softmax_over_the_others_alone() -> None:
    """As LAVIS: the own pair is masked with -10,000 before the softmax."""
    similar = torch.tensor([[14.0, 3.0, 0.0, 2.0, 2.5]])
    masked = similar.clone()
    masked[0, 0] = -10_000
    found = shares_of(similar, positive_mask(1, 5), floor=0.0)
    torch.testing.assert_close(found, masked.softmax(1)[0], atol=0.01, rtol=0.0)
    assert found[0] == 0


def test_a_pair_that_is_learned_takes_no_chance_from_hard_negatives() -> None:
    """The hardest 1 % of 1,680 candidates are rarely drawn with a floor that counts the own pair."""
    generator = torch.Generator().manual_seed(0)
    cosines = 0.2 + 0.1 * torch.randn(1, 1680, generator=generator)
    cosines[0, 0] = 0.9  # its own
    similar, hardest = cosines / 0.02, cosines[0, 1:].topk(17).indices + 1
    lavis, floored = (
        float(shares_of(similar, positive_mask(1, 1680), floor)[hardest].sum())
        for floor in (0.0, 1e-4)
    )
    others = (similar[0, 1:]).softmax(0).topk(17).values.sum()
    assert lavis == pytest.approx(float(others), abs=0.02) and lavis > 0.6 and floored < 0.05


def test_a_difference_that_float32_cannot_hold_still_orders_the_candidates() -> None:
    similar = torch.tensor([[900.0, 100.0, 0.0, -100.0]])  # e^-800 is 0
    assert shares_of(similar, positive_mask(1, 4), floor=0.0, draws=500)[1] == 1.0


def test_negatives_of_a_lane_are_blips_of_one_worker() -> None:
    """softmax over the local batch + 1e-4, the diagonal at 0 (blip_pretrain.py); other lanes play no part."""
    similar = torch.tensor([[6.0, 4.0, 5.0, 9.0, 9.5, 9.9]])
    lane = torch.tensor([3, 3, 3, 7, 7, 7])
    other = lane != 3
    expected = similar[0, :3].softmax(0) + 1e-4
    expected[0] = 0
    found = shares_of(
        similar.masked_fill(other, -torch.inf), positive_mask(1, 6) | other, floor=1e-4
    )
    torch.testing.assert_close(found[:3], expected / expected.sum(), atol=0.01, rtol=0.0)
    assert not found[3:].any()


def lanes_example() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Twelve samples in four lanes of three: the rows of a lane follow each other."""
    generator = torch.Generator().manual_seed(3)
    ids_BT = 10 * torch.arange(12)[:, None] + torch.arange(1, 5)
    images_BPF = torch.arange(12.0)[:, None, None].expand(12, 3, 2).clone()
    image_BD, text_BD = normalize(torch.randn(2, 12, 6, generator=generator), dim=-1).unbind()
    return (
        ids_BT,
        torch.ones(12, 4, dtype=torch.bool),
        images_BPF,
        image_BD,
        text_BD,
        torch.arange(12) // 3,
    )


def drawn_in(rows: Tensor) -> dict[int, tuple[int, int]]:
    """{sample: (the image, the text of its negatives)} where a rank has the samples `rows`."""
    ids, attention, images, image, text, lane = (given[rows] for given in lanes_example())
    pairs = matching_pairs(
        ids, attention, images, image_bQD=image[:, None], text_bD=text, scale=2.0, lane_b=lane
    )
    n = len(rows)
    shown, said = (
        pairs.images_MPF[n : 2 * n, 0, 0].long().tolist(),
        (pairs.ids_MT[2 * n :, 0] // 10).tolist(),
    )
    return dict(zip(rows.tolist(), zip(shown, said, strict=True), strict=True))


def test_negatives_of_a_lane_are_the_same_on_any_number_of_workers() -> None:
    torch.manual_seed(11)
    whole = drawn_in(torch.arange(12))
    assert all(row // 3 == image // 3 == text // 3 for row, (image, text) in whole.items())
    assert all(row not in found for row, found in whole.items())
    for world in (2, 4):  # rank r has the lanes v with v % world == r
        found: dict[int, tuple[int, int]] = {}
        for index in range(world):
            found |= drawn_in(
                torch.cat([torch.arange(3 * v, 3 * v + 3) for v in range(4) if v % world == index])
            )
        assert found == whole


def test_a_lane_of_one_sample_is_refused() -> None:
    ids, attention, images, image, text, _ = lanes_example()
    with pytest.raises(DataError, match="or in every lane where negatives are of a lane"):
        matching_pairs(
            ids,
            attention,
            images,
            image_bQD=image[:, None],
            text_bD=text,
            scale=1.0,
            lane_b=torch.arange(12),
        )


def test_a_recipe_follows_its_release() -> None:
    """BLIP pretrains with a worker's 90 samples and a floor; its retrieval and BLIP-2 with all, and none."""
    pages = [
        ("blip", "pretrain"),
        ("blip", "bootstrap"),
        ("blip", "filter"),
        ("blip:vit_l", "pretrain"),
    ]
    pages += [
        ("blip2", "represent"),
        ("blip2:retrieval", "retrieval"),
        ("instructblip", "represent"),
    ]
    found = {
        (system, stage): loss
        for system, stage in pages
        for loss in load(system)[stage].losses
        if isinstance(loss, Matching)
    }
    local = {key for key, loss in found.items() if loss == Matching(negatives="lane", floor=1e-4)}
    assert local == {("blip", "pretrain"), ("blip", "bootstrap"), ("blip:vit_l", "pretrain")}
    assert {found[key] for key in found.keys() - local} == {
        Matching(negatives="all", floor=0.0)
    } and len(found) == 7
    for system, samples in (("blip", 90), ("blip:vit_l", 75)):
        stage = load(system)["pretrain"]
        assert stage.budget.batch // stage.data.lanes == samples


def test_hash_is_uniform_and_depends_on_the_pair_not_its_position() -> None:
    keys = torch.arange(300) * 7919
    found = hash_uniform(keys, keys, torch.tensor([5]))
    assert float(found.min()) > 0 and float(found.max()) < 1
    assert float(found.mean()) == pytest.approx(0.5, abs=0.01)
    assert float((found < 0.1).double().mean()) == pytest.approx(0.1, abs=0.01)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hash_uniform(keys[order], keys, torch.tensor([5])), found[order])
    assert (hash_uniform(keys, keys, torch.tensor([6])) != found).double().mean() > 0.99


def test_a_seed_draws_the_same_pairs_and_another_seed_others() -> None:
    ids, attention, images, image, text = example()
    drawn = []
    for seed in (3, 3, 4, 5, 6):
        torch.manual_seed(seed)
        pairs = matching_pairs(
            ids, attention, images, image_bQD=image[:, None], text_bD=text, scale=0.1
        )
        drawn.append((pairs.images_MPF[:, 0, 0].tolist(), pairs.ids_MT[:, 0].tolist()))
    assert drawn[0] == drawn[1]
    assert any(other != drawn[0] for other in drawn[2:])


def test_rows_of_one_image_are_never_negatives_of_each_other() -> None:
    identity = torch.tensor(
        [7, 8, 7, -1, -1]
    )  # below 0 it is not known, and two of these need not be one image
    own_BB = positive_mask(5, 5, 0, identity, identity)
    assert torch.equal(own_BB.nonzero()[:, 1], torch.tensor([0, 2, 1, 0, 2, 3, 4]))
    drawn = torch.stack(
        [hard_negatives(torch.zeros(5, 5), own_BB, uniform(5, 5)) for _ in range(100)]
    )
    assert (
        not (drawn[:, 0] == 2).any() and not (drawn[:, 2] == 0).any() and (drawn[:, 3] == 4).any()
    )


def test_a_sample_without_a_negative_is_refused() -> None:
    with pytest.raises(DataError, match="no negative among 1 candidates"):
        hard_negatives(torch.zeros(1, 1), positive_mask(1, 1), uniform(1, 1))


def test_pairs_are_own_then_a_negative_image_then_a_negative_text() -> None:
    ids, attention, images, image, text = example()
    attention[2, 3:] = False
    pairs = matching_pairs(
        ids, attention, images, image_bQD=image[:, None], text_bD=text, scale=10.0
    )
    texts, shown = pairs.ids_MT[:, 0] // 10, pairs.images_MPF[:, 0, 0].long()
    rows = torch.arange(4)
    assert (
        torch.equal(texts[:8], rows.repeat(2))
        and torch.equal(shown[:4], rows)
        and torch.equal(shown[8:], rows)
    )
    assert not (shown[4:8] == rows).any() and not (texts[8:] == rows).any()
    assert torch.equal(pairs.attention_MT, attention[texts])


def test_of_several_vectors_of_an_image_the_nearest_counts() -> None:
    _, _, _, image, text = example(torch.float32)
    both = torch.stack([image, image.roll(1, 0)], dim=1)
    expected = torch.maximum(text @ image.T, text @ image.roll(1, 0).T)
    torch.testing.assert_close(nearest(text, both), expected)


def test_the_loss_is_cross_entropy_over_b_matches_and_2b_others_with_its_gradient() -> None:
    logits_MC = torch.randn(12, 2, requires_grad=True)
    truth_M = torch.tensor([1] * 4 + [0] * 8)
    loss, labels = Matching(), torch.zeros(4, 6)
    ours = loss(Outputs(group_by_sample(logits_MC))).sum() / loss.count(labels).sum()
    theirs = cross_entropy(logits_MC, truth_M)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits_MC)[0] for x in (ours, theirs)))


def test_a_head_that_only_knows_the_prior_costs_0_6365() -> None:
    """Predicting one match in three is where BLIP's users saw matching stuck (salesforce/BLIP#152)."""
    odds = torch.tensor([2 / 3, 1 / 3]).log().expand(5, 3, 2)
    assert float(matching(odds).mean() / 3) == pytest.approx(0.6365, abs=1e-4)


def test_where_negatives_come_from_is_an_output_of_its_own() -> None:
    assert Matching().requires == "match" and Matching(negatives="all").requires == "match_all"
    assert Matching(negatives="lane").requires == "match_lane" and Matching(floor=0.0).options == {
        "floor": 0.0
    }
    with pytest.raises(SpecError, match=r"probability in \[0, 1\), got 1"):
        Matching(floor=1.0)
    assert Matching().whole_batch and not Matching().cached_outputs
    with pytest.raises(DataError, match="ask the wiring for 'match_all'"):
        Matching(negatives="all")(Outputs())


def rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2
    )
    ids, attention, images, image, text = example()
    mine = slice(sum(SPLIT[:index]), sum(SPLIT[: index + 1]))
    narrow = slice(0, 4 + index)  # ranks pad to widths of their own
    images = images[mine].requires_grad_()
    pairs = matching_pairs(
        ids[mine, narrow], attention[mine, narrow], images, image_bQD=image[mine, None], text_bD=text[mine],
        scale=1.0, identity_b=torch.full((SPLIT[index],), -1), everywhere=True,
    )  # fmt: skip
    pairs.images_MPF.sum().backward()
    torch.save((*(t.detach() for t in pairs), images.grad), f"{folder}/{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_negatives_of_all_ranks_bring_their_gradient_home(tmp_path: Path) -> None:
    spawn(rank, (str(tmp_path),), nprocs=2)
    used = torch.zeros(4)
    for index in range(2):
        ids, attention, images, _ = torch.load(tmp_path / f"{index}.pt")
        rows, count = torch.arange(sum(SPLIT[:index]), sum(SPLIT[: index + 1])), SPLIT[index]
        texts, shown = ids[:, 0] // 10, images[:, 0, 0].long()
        assert torch.equal(texts[: 2 * count], rows.repeat(2)) and torch.equal(shown[:count], rows)
        assert (
            not (shown[count : 2 * count] == rows).any() and not (texts[2 * count :] == rows).any()
        )
        assert ids.shape[1] == 5 and torch.equal(attention.sum(1), torch.where(texts < 3, 4, 5))
        used += shown.bincount(minlength=4)
    grads = torch.cat([torch.load(tmp_path / f"{index}.pt")[3] for index in range(2)])
    torch.testing.assert_close(grads[:, 0, 0].float(), used)
