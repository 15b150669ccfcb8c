"""Momentum encoder and queues: exact updates, first in first out, safe from optimizers and casts."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from bridgework.errors import SpecError
from bridgework.models import MomentumConfig
from bridgework.models.momentum_encoder import MomentumEncoder, MomentumKeys
from bridgework.system import IGNORE
from tests.models.med_examples import build, pairs, spec

WANTS = frozenset({"momentum"})


def made(queue: int = 6, **fields: float) -> tuple[MomentumEncoder, dict[str, Tensor]]:
    torch.manual_seed(0)
    parameters = {"a.weight": torch.randn(3, 2), "b": torch.randn(2)}
    return MomentumEncoder(MomentumConfig(queue=queue, **fields), parameters, width=2), parameters


def keys(*values: float) -> MomentumKeys:
    column = torch.tensor(values)[:, None]
    return MomentumKeys(column.expand(-1, 2), -column.expand(-1, 2), torch.tensor(values).long())


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.995, 1.0])
def test_momentum_encoder_moves_exactly_by_its_decay(decay: float) -> None:
    momentum, begun = made(decay=decay)
    now = {name: torch.randn_like(tensor) for name, tensor in begun.items()}
    momentum.after_step(now)
    for name, twin in momentum.averaged_parameters(torch.float32).items():
        torch.testing.assert_close(
            twin, decay * begun[name] + (1 - decay) * now[name], atol=1e-7, rtol=0
        )
        if decay in (0.0, 1.0):
            assert torch.equal(twin, now[name] if decay == 0 else begun[name])


def test_the_queue_holds_the_last_entries_and_its_pointer_wraps() -> None:
    momentum, parameters = made(queue=6)
    for step in range(5):
        momentum.remember(keys(2.0 * step, 2.0 * step + 1))
        momentum.after_step(parameters)
    assert momentum.image_queue_QD[:, 0].tolist() == [6, 7, 8, 9, 4, 5]
    assert torch.equal(momentum.text_queue_QD, -momentum.image_queue_QD)
    assert torch.equal(momentum.identity_queue_Q, momentum.image_queue_QD[:, 0].long())
    assert int(momentum.pointer) == 4 and int(momentum.steps) == 5


def test_a_step_in_pieces_fills_the_queue_as_one() -> None:
    momentum, parameters = made(queue=4)
    for piece in (keys(1.0), keys(2.0, 3.0), keys(4.0)):
        momentum.remember(piece)
    momentum.after_step(parameters)
    assert momentum.image_queue_QD[:, 0].tolist() == [1, 2, 3, 4] and int(momentum.pointer) == 0


def test_a_batch_that_does_not_divide_the_queue_is_refused() -> None:
    momentum, parameters = made(queue=6)
    momentum.remember(keys(1.0, 2.0, 3.0, 4.0))
    with pytest.raises(SpecError, match=r"set momentum\.queue=4 or another budget\.batch"):
        momentum.after_step(parameters)


def test_new_queue_has_unit_vectors_and_unknown_identities() -> None:
    momentum, _ = made(queue=50)
    torch.testing.assert_close(momentum.image_queue_QD.norm(dim=1), torch.ones(50))
    assert not torch.equal(momentum.image_queue_QD, momentum.text_queue_QD)
    assert (momentum.identity_queue_Q < 0).all()


def test_alpha_rises_evenly_to_its_value_and_stays() -> None:
    momentum, parameters = made(queue=0, alpha=0.4, ramp=8)
    seen = []
    for _ in range(12):
        seen.append(float(momentum.alpha()))
        momentum.after_step(parameters)
    assert seen == pytest.approx([0.4 * min(1.0, step / 8) for step in range(12)])
    assert float(made(queue=0, alpha=0.4)[0].alpha()) == pytest.approx(0.4)


def test_cast_to_bfloat16_leaves_momentum_encoder_and_queue_exact() -> None:
    model = build(momentum=MomentumConfig(queue=8)).to(torch.bfloat16)
    assert model.momentum is not None and model.heads.vision.weight.dtype == torch.bfloat16
    assert {b.dtype for b in model.momentum.buffers()} == {torch.float32, torch.int64}
    name = "heads.vision.weight"
    before = model.momentum.averaged_parameters(torch.float32)[name].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.after_step()
    after = model.momentum.averaged_parameters(torch.float32)[name]
    expected = 0.995 * before + 0.005 * model.heads.vision.weight.float()
    torch.testing.assert_close(after, expected)
    ids, attention, _, pixels = pairs()
    assert model(ids, attention, pixels=pixels, requested=WANTS).image_key_BD.isfinite().all()


def test_all_of_it_is_buffers_that_a_checkpoint_keeps() -> None:
    model = build(momentum=MomentumConfig(queue=8))
    names = [name for name in model.state_dict() if name.startswith("momentum.")]
    assert not any(name.startswith("momentum.") for name, _ in model.named_parameters())
    assert {n for n in names if ".twin." not in n} == {
        f"momentum.{n}"
        for n in ("image_queue_QD", "text_queue_QD", "identity_queue_Q", "pointer", "steps")
    }
    other = build(momentum=MomentumConfig(queue=8), seed=5)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_momentum_encoder_averages_exactly_the_parameters_of_the_vectors() -> None:
    model = build(momentum=MomentumConfig(queue=0))
    assert model.momentum is not None
    twin = set(model.momentum.averaged_parameters(torch.float32))
    ids, attention, _, pixels = pairs()
    pooled = model(ids, attention, pixels=pixels, requested=frozenset({"pooled"}))
    (pooled.image_BD.sum() + pooled.text_BD.sum()).backward()
    assert twin == {name for name, p in model.named_parameters() if p.grad is not None}


def test_keys_are_the_momentum_encoders_vectors_without_gradient() -> None:
    model = build(momentum=MomentumConfig(queue=8))
    assert model.momentum is not None
    ids, attention, labels, pixels = pairs()
    first = model(ids, attention, labels, pixels, requested=WANTS)
    torch.testing.assert_close(first.image_key_BD, first.image_BD)
    torch.testing.assert_close(first.text_key_BD, first.text_BD)
    assert not first.image_key_BD.requires_grad and not first.text_key_BD.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    second = model(ids, attention, labels, pixels, requested=WANTS)
    torch.testing.assert_close(second.image_key_BD, first.image_key_BD)
    assert not torch.allclose(second.image_BD, first.image_BD)


def test_only_training_samples_enter_the_queue() -> None:
    model = build(momentum=MomentumConfig(queue=4))
    assert model.momentum is not None
    before = model.momentum.image_queue_QD.clone()
    ids, attention, labels, pixels = pairs()
    model(ids, attention, labels, pixels, requested=WANTS)  # evaluation
    model.train()
    with torch.no_grad():
        model(ids, attention, labels, pixels, requested=WANTS)  # the first of two passes
    model(ids, attention, torch.full_like(labels, IGNORE), pixels, requested=WANTS)  # an idle rank
    labels[1:3] = IGNORE
    seen = model(ids, attention, labels, pixels, identity=torch.arange(4), requested=WANTS)
    model.after_step()
    assert torch.equal(model.momentum.image_queue_QD[:2], seen.image_key_BD[[0, 3]])
    assert torch.equal(model.momentum.image_queue_QD[2:], before[2:])
    assert model.momentum.identity_queue_Q.tolist() == [0, 3, -1, -1]


def test_loading_weights_without_momentum_encoder_copies_the_model_to_it() -> None:
    """A fine-tune starts from an artifact, which has no momentum encoder."""
    model, weights = build(momentum=MomentumConfig(queue=8)), build(seed=7)
    model.load_state_dict(model.adopt(weights.state_dict()), strict=False)
    assert model.momentum is not None and model.config.pretrained == ("momentum.*",)
    own = dict(model.named_parameters())
    for name, twin in model.momentum.averaged_parameters(torch.float32).items():
        assert torch.equal(twin, own[name]) and torch.equal(own[name], weights.state_dict()[name])


def test_the_temperature_is_held_within_its_bounds_and_finds_its_way_back() -> None:
    model = build(momentum=MomentumConfig(queue=0))
    for raw, held in ((0.07, 0.07), (2.0, 0.5), (-1.0, 0.001)):
        model.heads.temperature.data.fill_(raw)
        scale = model.heads.scale(3)
        torch.testing.assert_close(scale, torch.full((3,), 1 / held))
        (grad,) = torch.autograd.grad(scale.sum(), model.heads.temperature)
        assert grad < 0


def test_a_spec_out_of_range_is_refused() -> None:
    with pytest.raises(SpecError, match=r"must be in \[0, 1\], got 1.5"):
        MomentumConfig(decay=1.5)
    with pytest.raises(SpecError, match="0 or more"):
        MomentumConfig(queue=-1)
    with pytest.raises(SpecError, match="need the vectors of 'contrast'"):
        spec("caption", momentum=MomentumConfig())


def rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2
    )
    momentum, parameters = made(queue=8)
    momentum.remember(keys(1.0, 2.0, 3.0) if index == 0 else keys(4.0))
    momentum.after_step(parameters)
    torch.save(
        (momentum.image_queue_QD, momentum.identity_queue_Q, momentum.pointer),
        f"{folder}/{index}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


def test_every_rank_queues_the_keys_of_all_ranks(tmp_path: Path) -> None:
    spawn(rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{index}.pt") for index in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0][:4, 0].tolist() == [1, 2, 3, 4] and int(first[2]) == 4
