"""Query contrast against its formula, and over two ranks against one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy, normalize

from bridgework.errors import DataError, SpecError
from bridgework.losses import QueryContrast
from bridgework.models.base import Outputs

SPLITS = ([3, 3], [5, 1])  # samples of each rank


def example() -> tuple[Tensor, Tensor, Tensor]:
    """(6, 4, 5) image queries, (6, 5) texts and a learned temperature."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        torch.randn(6, 4, 5, generator=generator),
        torch.randn(6, 5, generator=generator),
    )
    return images.requires_grad_(), texts.requires_grad_(), torch.tensor(0.2).requires_grad_()


def outputs(image_BQD: Tensor, text_BD: Tensor, temperature: Tensor) -> Outputs:
    return Outputs(
        image_BQD=image_BQD, text_BD=text_BD, logit_scale=(1 / temperature).expand(len(text_BD))
    )


def rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2
    )
    results = []
    for split in SPLITS:
        image_BQD, text_BD, temperature = example()
        own = slice(sum(split[:index]), sum(split[: index + 1]))
        loss_B = QueryContrast()(outputs(image_BQD[own], text_BD[own], temperature))
        loss_B.sum().backward()
        results.append((loss_B.detach(), image_BQD.grad, text_BD.grad, temperature.grad))
    torch.save(results, f"{folder}/{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_have_the_losses_and_the_gradients_of_one_process(tmp_path: Path) -> None:
    """LAVIS detaches every gathered key, so there each direction trains its anchors alone."""
    spawn(rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{index}.pt") for index in range(2)]
    leaves = example()
    whole_B = QueryContrast()(outputs(*leaves))
    whole_B.sum().backward()
    for (loss_0, *grads_0), (loss_1, *grads_1) in zip(*ranks, strict=True):
        torch.testing.assert_close(torch.cat([loss_0, loss_1]), whole_B.detach())
        for grad_0, grad_1, leaf in zip(grads_0, grads_1, leaves, strict=True):
            torch.testing.assert_close(grad_0 + grad_1, leaf.grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_formula_of_the_best_query(smoothing: float) -> None:
    image_BQD, text_BD, temperature = example()
    cosine_BBQ = torch.einsum(
        "iqd,td->itq", normalize(image_BQD, dim=-1), normalize(text_BD, dim=-1)
    )
    similar_BB, own_B = cosine_BBQ.max(-1).values / temperature, torch.arange(6)
    log_image, log_text = similar_BB.log_softmax(1), similar_BB.T.log_softmax(1)
    expected = sum(
        -(1 - smoothing) * log[own_B, own_B] - smoothing * log.mean(1)
        for log in (log_image, log_text)
    ) / torch.tensor(2.0)
    loss = QueryContrast(label_smoothing=smoothing)
    torch.testing.assert_close(loss(outputs(image_BQD, text_BD, temperature)), expected)
    torch.testing.assert_close(loss.count(torch.zeros(6, 3)), torch.ones(6))
    by_torch = cross_entropy(similar_BB, own_B, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(
        by_torch, -(1 - smoothing) * log_image[own_B, own_B] - smoothing * log_image.mean(1)
    )


def test_neither_the_order_of_queries_nor_a_worse_one_matters() -> None:
    image_BQD, text_BD, temperature = example()
    loss_B = QueryContrast()(outputs(image_BQD, text_BD, temperature))
    permuted = outputs(image_BQD[:, [2, 0, 3, 1]], text_BD, temperature)
    torch.testing.assert_close(QueryContrast()(permuted), loss_B)
    near_BQD, near_BD = image_BQD.detach().abs(), text_BD.detach().abs()  # all cosines are above 0
    worse_BQD = torch.cat([near_BQD, -torch.ones(6, 1, 5)], dim=1)
    torch.testing.assert_close(
        QueryContrast()(outputs(worse_BQD, near_BD, temperature)),
        QueryContrast()(outputs(near_BQD, near_BD, temperature)),
    )


def test_only_the_query_that_speaks_gets_a_gradient() -> None:
    image_1QD, text_1D, temperature = (leaf[:1] if leaf.ndim else leaf for leaf in example())
    two_texts = torch.cat([text_1D, text_1D])  # both texts are nearest to one and the same query
    two_images = torch.cat([image_1QD, image_1QD + 0.1])
    two_images = two_images.detach().requires_grad_()
    QueryContrast()(
        outputs(two_images, two_texts.detach() + torch.tensor([[0.0], [0.05]]), temperature)
    ).sum().backward()
    assert two_images.grad is not None
    best_2 = torch.einsum(
        "iqd,d->iq", normalize(two_images.detach(), dim=-1), text_1D[0].detach()
    ).argmax(-1)
    touched = two_images.grad.abs().sum(-1) > 0
    assert touched.sum(-1).tolist() == [1, 1]
    assert touched[torch.arange(2), best_2].all()


def test_outputs_that_were_not_pooled_and_smoothing_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="ask the wiring for 'pooled'"):
        QueryContrast()(Outputs())
    with pytest.raises(SpecError, match=r"Got 1; expected a number in \[0, 1\)"):
        QueryContrast(label_smoothing=1.0)


def test_cached_outputs_have_one_row_per_sample() -> None:
    given = outputs(*example())
    assert {name: getattr(given, name).shape[0] for name in QueryContrast.cached_outputs} == {
        "image_BQD": 6, "text_BD": 6, "logit_scale": 6,
    }  # fmt: skip


IDENTITY = torch.tensor(
    [7, 8, 7, -1, 8, -1]
)  # rows 0 and 2 show one image, 1 and 4 another; two are not known


def test_all_texts_of_an_image_are_right_with_equal_shares() -> None:
    """As LAVIS fine-tunes for retrieval: (1 - 0.1) / as many + 0.1 / all."""
    image_BQD, text_BD, temperature = example()
    given = outputs(image_BQD, text_BD, temperature)
    given.identity_B = IDENTITY
    same = (IDENTITY[:, None] == IDENTITY) & (IDENTITY[:, None] >= 0) | torch.eye(
        6, dtype=torch.bool
    )
    shares = 0.9 * same / same.sum(1, keepdim=True) + 0.1 / 6
    cosines = torch.einsum(
        "iqd,kd->iqk", normalize(image_BQD, dim=-1), normalize(text_BD, dim=-1)
    ).amax(1)
    similar = cosines / temperature
    expected = (
        -((shares * similar.log_softmax(1)).sum(1) + (shares * similar.T.log_softmax(1)).sum(1)) / 2
    )
    torch.testing.assert_close(QueryContrast()(given), expected)


def rank_with_identities(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2
    )
    image_BQD, text_BD, temperature = example()
    mine = slice(4) if index == 0 else slice(4, 6)
    given = outputs(image_BQD[mine], text_BD[mine], temperature)
    given.identity_B = IDENTITY[mine]
    torch.save(QueryContrast()(given).detach(), f"{folder}/{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_an_image_is_known_on_every_rank(tmp_path: Path) -> None:
    spawn(rank_with_identities, (str(tmp_path),), nprocs=2)
    given = outputs(*example())
    given.identity_B = IDENTITY
    found = torch.cat([torch.load(tmp_path / f"{index}.pt") for index in range(2)])
    torch.testing.assert_close(found, QueryContrast()(given).detach())
