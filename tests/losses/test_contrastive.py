"""Contrast against its formula, and over two ranks against one process with the whole batch."""

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
from bridgework.models.prefix_vlm import Outputs

SPLITS = ([4, 4], [5, 3], [8, 0])  # samples of each rank
TEMPERATURE = 0.2


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Images and texts of 8 samples, and a weight that both ranks share."""
    generator = torch.Generator().manual_seed(0)
    image_BD, text_BD = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64).unbind()
    return image_BD, text_BD, torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_()


def rank(index: int, folder: str) -> None:
    """One process: for every split its loss, and the gradient of the shared weight and of its own images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    results = []
    for split in SPLITS:
        image_BD, text_BD, weight = example()
        own = slice(sum(split[:index]), sum(split[: index + 1]))
        image_bD = image_BD[own].clone().requires_grad_()
        loss = info_nce(image_bD @ weight, text_BD[own] @ weight, TEMPERATURE)
        loss.backward()
        results.append((loss.detach(), weight.grad, image_bD.grad, gather(text_BD[own]).offset))
    torch.save(results, f"{folder}/{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_and_the_gradients_of_one_process(tmp_path: Path) -> None:
    spawn(rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{index}.pt") for index in range(2)]
    image_BD, text_BD, weight = example()
    image_BD.requires_grad_()
    whole = info_nce(image_BD @ weight, text_BD @ weight, TEMPERATURE)
    whole.backward()
    assert weight.grad is not None and image_BD.grad is not None
    for split, (loss_0, weight_0, image_0, offset_0), (loss_1, weight_1, image_1, offset_1) in zip(
        SPLITS, *ranks, strict=True
    ):
        torch.testing.assert_close(loss_0 + loss_1, whole.detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(weight_0 + weight_1, weight.grad, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(torch.cat([image_0, image_1]), image_BD.grad, atol=1e-6, rtol=1e-6)
        assert (offset_0, offset_1) == (0, split[0])


def test_one_process_matches_the_formula() -> None:
    image_BD, text_BD, _ = example()
    similarity_BB = normalize(image_BD.float(), dim=1) @ normalize(text_BD.float(), dim=1).T / 0.07
    own_B = torch.arange(8)
    expected = (cross_entropy(similarity_BB, own_B) + cross_entropy(similarity_BB.T, own_B)) / 2
    loss = Contrastive()
    ours = loss(Outputs(image_BD=image_BD, text_BD=text_BD)) / loss.count(torch.zeros(8, 3))
    torch.testing.assert_close(ours, expected)


def test_the_length_of_a_vector_does_not_matter() -> None:
    image_BD, text_BD, _ = example()
    torch.testing.assert_close(info_nce(3 * image_BD, text_BD / 7, 0.07), info_nce(image_BD, text_BD, 0.07))


def test_pairs_that_match_cost_less_than_shuffled_ones() -> None:
    image_BD, _, _ = example()
    assert info_nce(image_BD, image_BD, 0.07) < info_nce(image_BD, image_BD.roll(1, 0), 0.07)


def test_one_process_gathers_its_own_rows() -> None:
    rows = torch.randn(3, 2)
    assert gather(rows).rows_BD is rows and gather(rows).offset == 0


def test_outputs_that_were_not_pooled_and_a_temperature_of_zero_are_refused() -> None:
    with pytest.raises(DataError, match="ask the wiring for 'pooled'"):
        Contrastive()(Outputs())
    with pytest.raises(SpecError, match="above 0"):
        Contrastive(temperature=0.0)


def test_contrast_needs_a_workers_whole_share_at_once() -> None:
    assert Contrastive().whole_batch and Contrastive().needs == "pooled"
