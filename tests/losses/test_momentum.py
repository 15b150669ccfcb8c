"""Momentum contrast against a loop over its definition, plain contrast, and over two ranks."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import normalize

from bridgework.errors import DataError
from bridgework.losses import MomentumContrastive
from bridgework.losses.contrastive import info_nce, soft_targets

SPLITS = ([2, 2], [3, 1], [4, 0])


@dataclass
class Outputs:
    image_BD: Tensor | None = None
    text_BD: Tensor | None = None
    logit_scale: Tensor | None = None
    image_key_BD: Tensor | None = None
    text_key_BD: Tensor | None = None
    identity_B: Tensor | None = None
    image_queue_QD: Tensor | None = None
    text_queue_QD: Tensor | None = None
    identity_queue_Q: Tensor | None = None
    alpha: Tensor | None = None


def example(queue: int = 6, alpha: float = 0.4) -> Outputs:
    generator = torch.Generator().manual_seed(0)
    made = normalize(torch.randn(4 + 4 + 4 + 4 + 2 * queue, 5, generator=generator), dim=-1)
    image, text, image_key, text_key, rest = made.split([4, 4, 4, 4, 2 * queue])
    return Outputs(
        image.requires_grad_(), text.requires_grad_(), torch.full((4,), 1 / 0.2), image_key, text_key,
        torch.full((4,), -1), rest[:queue], rest[queue:], torch.full((queue,), -1), torch.tensor(alpha),
    )  # fmt: skip


def by_hand(outputs: Outputs, same: list[list[int]] | None = None) -> Tensor:
    """The definition, row by row; `same` are the columns that belong to each row."""
    losses = []
    for row in range(4):
        total = torch.tensor(0.0)
        for asks, twin, keys, queue in (
            (outputs.image_BD, outputs.image_key_BD, outputs.text_key_BD, outputs.text_queue_QD),
            (outputs.text_BD, outputs.text_key_BD, outputs.image_key_BD, outputs.image_queue_QD),
        ):
            assert asks is not None and twin is not None and keys is not None and queue is not None
            everything = torch.cat([keys, queue])
            similar, seen = (everything @ asks[row] / 0.2, everything @ twin[row] / 0.2)
            hard = torch.zeros(len(everything))
            own = same[row] if same else [row]
            hard[own] = 1 / len(own)
            assert outputs.alpha is not None
            soft = outputs.alpha * seen.softmax(0) + (1 - outputs.alpha) * hard
            total = total - (soft * similar.log_softmax(0)).sum() / 2
        losses.append(total)
    return torch.stack(losses)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_loss_is_its_definition_with_its_gradient(alpha: float) -> None:
    outputs = example(alpha=alpha)
    ours, expected = MomentumContrastive()(outputs), by_hand(outputs)
    torch.testing.assert_close(ours, expected)
    given = (outputs.image_BD, outputs.text_BD)
    for mine, theirs in zip(
        *(torch.autograd.grad(x.sum(), given) for x in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_captions_of_one_image_share_the_target() -> None:
    outputs = replace(
        example(),
        identity_B=torch.tensor([3, 9, 3, -1]),
        identity_queue_Q=torch.tensor([-1, 9, 1, 3, -1, -1]),
    )
    same = [[0, 2, 7], [1, 5], [0, 2, 7], [3]]
    torch.testing.assert_close(MomentumContrastive()(outputs), by_hand(outputs, same))


def test_without_queue_and_momentum_encoder_it_matches_info_nce() -> None:
    outputs = example(queue=0, alpha=0.0)
    assert outputs.image_BD is not None and outputs.text_BD is not None
    same = replace(
        outputs, image_key_BD=outputs.image_BD.detach(), text_key_BD=outputs.text_BD.detach()
    )
    plain = info_nce(outputs.image_BD, outputs.text_BD, 1 / 0.2)
    torch.testing.assert_close(MomentumContrastive()(same), plain)


def test_targets_sum_to_one_and_without_alpha_are_hard() -> None:
    twin, own = torch.randn(3, 7), torch.eye(3, 7, dtype=torch.bool)
    own[0, 5] = True
    for alpha in (0.0, 0.4, 1.0):
        torch.testing.assert_close(soft_targets(twin, own, alpha).sum(1), torch.ones(3))
    assert torch.equal(soft_targets(twin, own, 0.0)[0], torch.tensor([0.5, 0, 0, 0, 0, 0.5, 0]))
    torch.testing.assert_close(soft_targets(twin, own, 1.0), twin.softmax(1))


def test_the_temperature_learns_and_the_keys_do_not() -> None:
    outputs = example()
    raw = torch.tensor(0.2, requires_grad=True)
    keys = torch.nn.Parameter(torch.randn(4, 5))
    outputs = replace(outputs, logit_scale=(1 / raw).expand(4), image_key_BD=keys.detach())
    MomentumContrastive()(outputs).sum().backward()
    assert raw.grad is not None and raw.grad != 0 and keys.grad is None


def test_two_passes_over_micro_batches_have_the_gradients_of_the_complete_batch() -> None:
    raw = torch.tensor(0.2, requires_grad=True)
    loss, whole = MomentumContrastive(), replace(example(), logit_scale=(1 / raw).expand(4))
    expected = torch.autograd.grad(loss(whole).sum(), (whole.image_BD, raw), retain_graph=True)
    totals = [torch.zeros(4, 5), torch.zeros(())]
    for live in (slice(0, 3), slice(3, 4)):
        parts = {}
        for name in loss.cached_outputs:
            given = getattr(whole, name)
            parts[name] = torch.cat([given[i : i + 1] if live.start <= i < live.stop else given[i : i + 1].detach()
                                     for i in range(4)])  # fmt: skip
        grads = torch.autograd.grad(
            loss(replace(whole, **parts)).sum(), (whole.image_BD, raw), retain_graph=True
        )
        totals = [total + grad for total, grad in zip(totals, grads, strict=True)]
    for total, grad in zip(totals, expected, strict=True):
        torch.testing.assert_close(total, grad)


def test_outputs_without_momentum_encoder_are_refused() -> None:
    with pytest.raises(DataError, match="ask the wiring for 'momentum'"):
        MomentumContrastive()(Outputs())
    with pytest.raises(DataError, match="Got 7 of 8 tensors"):
        MomentumContrastive()(replace(example(), alpha=None))
    assert torch.equal(MomentumContrastive().count(torch.zeros(3, 2)), torch.ones(3))


def rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2
    )
    results = []
    for split in SPLITS:
        whole = replace(example(), identity_B=torch.tensor([5, 6, 5, -1]))
        mine = slice(sum(split[:index]), sum(split[: index + 1]))
        raw = torch.tensor(0.2, requires_grad=True)
        shared = {"image_queue_QD", "text_queue_QD", "identity_queue_Q", "alpha"}
        own = {f.name: getattr(whole, f.name)[mine] for f in fields(whole) if f.name not in shared}
        losses = MomentumContrastive()(
            replace(whole, **own | {"logit_scale": (1 / raw).expand(split[index])})
        )
        grads = torch.autograd.grad(losses.sum(), (whole.image_BD, raw))
        results.append((losses.detach(), *grads))
    torch.save(results, f"{folder}/{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_have_the_losses_and_gradients_of_one_process(tmp_path: Path) -> None:
    spawn(rank, (str(tmp_path),), nprocs=2)
    raw = torch.tensor(0.2, requires_grad=True)
    whole = replace(
        example(), identity_B=torch.tensor([5, 6, 5, -1]), logit_scale=(1 / raw).expand(4)
    )
    losses = MomentumContrastive()(whole)
    image_grad, scale_grad = torch.autograd.grad(losses.sum(), (whole.image_BD, raw))
    for first, second in zip(
        *(torch.load(tmp_path / f"{index}.pt") for index in range(2)), strict=True
    ):
        torch.testing.assert_close(torch.cat([first[0], second[0]]), losses.detach())
        torch.testing.assert_close(first[1] + second[1], image_grad)
        torch.testing.assert_close(first[2] + second[2], scale_grad)
