"""Contrastive loss against its formula, and over ranks against one process."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy, normalize

from bridgework.errors import DataError, SpecError
from bridgework.losses import Contrastive
from bridgework.losses.contrastive import info_nce
from bridgework.losses.gather import gather
from bridgework.models.base import Outputs

SPLITS = {2: ([4, 4], [5, 3], [8, 0]), 4: ([2, 2, 2, 2], [3, 0, 4, 1])}  # samples of each rank
LOG_SCALE = 1.6


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and texts of 8 samples, and what all ranks share: a weight, and the logarithm of the scale."""
    generator = torch.Generator().manual_seed(0)
    image_BD, text_BD = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64).unbind()
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    return image_BD, text_BD, weight, torch.tensor(LOG_SCALE, requires_grad=True)


def pooled(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor) -> Outputs:
    return Outputs(image_BD=image_BD, text_BD=text_BD, logit_scale=logit_scale)


def whole_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of one process in plain torch, all against all, and the gradients of weight, scale and images."""
    image_BD, text_BD, weight, log_scale = example()
    image_BD.requires_grad_()
    image_BE, text_BE = (normalize((rows @ weight).float(), dim=-1) for rows in (image_BD, text_BD))
    logits_BB = log_scale.exp() * image_BE @ text_BE.T
    own_B = torch.arange(8)
    loss = (
        cross_entropy(logits_BB, own_B, reduction="sum")
        + cross_entropy(logits_BB.T, own_B, reduction="sum")
    ) / 2
    return loss.detach(), *torch.autograd.grad(loss, (weight, log_scale, image_BD))


def without_gradient(rows_bD: Tensor) -> Tensor:
    """Return a plain all-gather: other ranks' rows are constants, its own have their gradient."""
    gathered = gather(rows_bD.detach())
    before, _, after = gathered.rows_BD.tensor_split(
        [gathered.offset, gathered.offset + len(rows_bD)]
    )
    return torch.cat([before, rows_bD, after])


def rank(index: int, world: int, folder: str) -> None:
    """One process: for every split its loss and gradients, and those of a gather that stops them."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=world
    )
    results = []
    for split in SPLITS[world]:
        image_BD, text_BD, weight, log_scale = example()
        own = slice(sum(split[:index]), sum(split[: index + 1]))
        image_bD = image_BD[own].clone().requires_grad_()
        loss_b = info_nce(
            image_bD @ weight, text_BD[own] @ weight, log_scale.exp().expand(len(image_bD))
        )
        exact = torch.autograd.grad(loss_b.sum(), (weight, log_scale, image_bD))
        image_bE, text_bE = (
            normalize((r @ weight).float(), dim=-1) for r in (image_bD, text_BD[own])
        )
        own_b = torch.arange(own.start, own.stop)
        cut = (
            cross_entropy(
                log_scale.exp() * image_bE @ without_gradient(text_bE).T, own_b, reduction="sum"
            )
            + cross_entropy(
                log_scale.exp() * text_bE @ without_gradient(image_bE).T, own_b, reduction="sum"
            )
        ) / 2
        (stopped,) = torch.autograd.grad(cut, weight)
        results.append(
            (loss_b.detach(), *exact, gather(text_BD[own]).offset, cut.detach(), stopped)
        )
    torch.save(results, f"{folder}/{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", SPLITS)
def test_ranks_have_the_loss_and_the_gradients_of_one_process(world: int, tmp_path: Path) -> None:
    spawn(rank, (world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{index}.pt") for index in range(world)]
    loss, weight, scale, images = whole_batch()
    for split, *results in zip(SPLITS[world], *ranks, strict=True):
        losses, weights, scales, own_images, offsets, cut, stopped = zip(*results, strict=True)
        assert [len(part) for part in losses] == split
        torch.testing.assert_close(torch.cat(losses).sum(), loss, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(sum(weights), weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(sum(scales), scale, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(torch.cat(own_images), images, atol=1e-6, rtol=1e-6)
        assert list(offsets) == [sum(split[:index]) for index in range(world)]
        # a gather that stops the gradient gives the same loss and another gradient
        torch.testing.assert_close(sum(cut), loss, atol=1e-6, rtol=1e-6)
        assert split == [8, 0] or not torch.allclose(sum(stopped), weight, rtol=1e-2, atol=1e-3)


def test_one_process_matches_the_formula() -> None:
    image_BD, text_BD, *_ = example()
    similarity_BB = normalize(image_BD.float(), dim=1) @ normalize(text_BD.float(), dim=1).T / 0.07
    own_B = torch.arange(8)
    expected = (cross_entropy(similarity_BB, own_B) + cross_entropy(similarity_BB.T, own_B)) / 2
    loss, labels = Contrastive(), torch.zeros(8, 3)
    ours = loss(Outputs(image_BD=image_BD, text_BD=text_BD))
    assert ours.shape == loss.count(labels).shape == (8,)
    torch.testing.assert_close(ours.sum() / loss.count(labels).sum(), expected)
    each = cross_entropy(similarity_BB, own_B, reduction="none") + cross_entropy(
        similarity_BB.T, own_B, reduction="none"
    )
    torch.testing.assert_close(ours, each / 2)


def test_a_learned_temperature_is_that_of_the_outputs() -> None:
    image_BD, text_BD, _, log_scale = example()
    outputs = pooled(image_BD, text_BD, log_scale.exp().expand(8))
    torch.testing.assert_close(
        Contrastive(temperature=None)(outputs),
        Contrastive(temperature=math.exp(-LOG_SCALE))(outputs),
    )
    with pytest.raises(SpecError, match="this wiring learns none"):
        Contrastive(temperature=None)(Outputs(image_BD=image_BD, text_BD=text_BD))


def test_two_passes_over_micro_batches_have_the_gradients_of_the_batch_and_naive_ones_do_not() -> (
    None
):
    """GradCache (arXiv:2101.06983), for the towers and for the scale, which every pass reads."""
    _, weight, scale, _ = whole_batch()
    image_BD, text_BD, own_weight, log_scale = example()
    loss = Contrastive(temperature=None)
    assert loss.cached_outputs == ("image_BD", "text_BD", "logit_scale")
    assert Contrastive().cached_outputs == ("image_BD", "text_BD")

    def outputs(rows: slice) -> list[Tensor]:
        size = len(image_BD[rows])
        return [
            image_BD[rows] @ own_weight,
            text_BD[rows] @ own_weight,
            log_scale.exp().expand(size),
        ]

    micro = [slice(0, 3), slice(3, 6), slice(6, 8)]
    cached = [[t.detach() for t in outputs(rows)] for rows in micro]
    totals, naive = [torch.zeros_like(own_weight), torch.zeros(())], torch.zeros_like(own_weight)
    for live, rows in enumerate(micro):
        parts = [outputs(rows) if m == live else cached[m] for m in range(len(micro))]
        cached_outputs = pooled(*(torch.cat(field) for field in zip(*parts, strict=True)))
        grads = torch.autograd.grad(loss(cached_outputs).sum(), (own_weight, log_scale))
        totals = [total + grad for total, grad in zip(totals, grads, strict=True)]
        naive += torch.autograd.grad(loss(pooled(*outputs(rows))).sum(), own_weight)[0]
    torch.testing.assert_close(totals[0], weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(totals[1], scale, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(naive, weight, rtol=1e-2, atol=1e-3)


def test_the_length_of_a_vector_does_not_matter() -> None:
    image_BD, text_BD, *_ = example()
    torch.testing.assert_close(
        info_nce(3 * image_BD, text_BD / 7, 14.0), info_nce(image_BD, text_BD, 14.0)
    )


def test_pairs_that_match_cost_less_than_shuffled_ones() -> None:
    image_BD, *_ = example()
    assert (
        info_nce(image_BD, image_BD, 14.0).sum()
        < info_nce(image_BD, image_BD.roll(1, 0), 14.0).sum()
    )


def test_swapped_towers_and_permuted_pairs_cost_the_same() -> None:
    image_BD, text_BD, *_ = example()
    loss_B, order = (
        info_nce(image_BD, text_BD, 5.0),
        torch.randperm(8, generator=torch.Generator().manual_seed(1)),
    )
    torch.testing.assert_close(info_nce(text_BD, image_BD, 5.0), loss_B)
    torch.testing.assert_close(info_nce(image_BD[order], text_BD[order], 5.0), loss_B[order])


def test_the_loss_is_known_for_orthonormal_pairs_and_for_a_scale_of_nearly_nothing() -> None:
    image_BD, text_BD, *_ = example()
    expected = math.log(1 + 7 * math.exp(-3.0))
    torch.testing.assert_close(
        info_nce(torch.eye(8), torch.eye(8), 3.0), torch.full((8,), expected)
    )
    torch.testing.assert_close(info_nce(image_BD, text_BD, 1e-6), torch.full((8,), math.log(8)))


def test_one_process_gathers_its_own_rows() -> None:
    rows = torch.randn(3, 2)
    assert gather(rows).rows_BD is rows and gather(rows).offset == 0


def test_outputs_that_were_not_pooled_and_a_temperature_of_zero_are_refused() -> None:
    with pytest.raises(DataError, match="ask the wiring for 'pooled'"):
        Contrastive()(Outputs())
    with pytest.raises(SpecError, match="above 0"):
        Contrastive(temperature=0.0)


def test_contrastive_compares_the_complete_batch_and_caches_outputs() -> None:
    assert (
        Contrastive().whole_batch
        and Contrastive().requires == "pooled"
        and Contrastive().cached_outputs
    )
