"""The only door to DeepSpeed: ZeRO, the optimizer step, its state on disk, weights gathered from its shards."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

from bridgework.data.batch import Batch
from bridgework.errors import RunError
from bridgework.system import AdamW, Stage
from bridgework.training.step import Step

# DeepSpeed 0.19 still calls what torch 2.13 has renamed, at every step.
warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
TAG = "state"  # the folder of DeepSpeed's files in a checkpoint


class Engine:
    """One stage's Step under DeepSpeed, on one rank. All ranks call every method together."""

    def __init__(self, step: Step, stage: Stage, multipliers: Mapping[str, float], *, micro_batches: int) -> None:
        """`multipliers`: what trains -> multiplier of the learning rate, by the names of the wiring's parameters."""
        # Without this, every start on a CPU compiles a C++ extension for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._step = step
        self._optim = stage.optim
        groups = _groups(step, multipliers, stage.optim)
        optimizer = torch.optim.AdamW(groups, lr=stage.optim.peak_lr, betas=stage.optim.betas)
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=step,
                optimizer=optimizer,
                config=config(stage, micro_batches=micro_batches),
                dist_init_required=False,
            )
        self.device: torch.device = self._engine.device

    def train_step(self, batches: Sequence[Batch], lr: float) -> tuple[Tensor, float]:
        """One optimizer step over this rank's micro-batches.

        Returns the mean of every loss over the global batch (float32, one a loss) and the norm of the gradient.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["multiplier"]
        counts = _summed(self._step.counts(batches).to(self.device)).clamp(min=1)
        weights = torch.tensor([loss.weight for loss in self._step.losses], device=self.device)
        total = torch.zeros_like(counts)
        self._engine.train()
        for batch in batches:
            sums = self._engine(batch.to(self.device))
            # DeepSpeed averages over ranks; what we divide by is a count over all of them already.
            self._engine.backward((weights * sums / counts).sum() * dist.get_world_size(), scale_wrt_gas=False)
            plain = self._plain_norm()  # before the step, which drops the gradients
            self._engine.step()
            total += sums.detach()
        known = self._engine.get_global_grad_norm()
        return _summed(total) / counts, float(plain if known is None else known)

    def _plain_norm(self) -> Tensor:
        """Of the gradients as they lie on the parameters: ZeRO 0 in float32 has them all, and no norm of its own."""
        return nn.utils.get_total_norm([p.grad for p in self._step.parameters() if p.grad is not None])

    def save(self, folder: Path, client: Mapping[str, Any]) -> None:
        """Every rank's part of the resume state under `folder`/state; frozen weights are not in it."""
        with _quiet():
            self._engine.save_checkpoint(
                str(folder), tag=TAG, client_state=dict(client), save_latest=False, exclude_frozen_parameters=True
            )

    def load(self, folder: Path) -> None:
        """Raises RunError when there is no state, or DeepSpeed does not take it back."""
        path = None
        if (folder / TAG).is_dir():
            with _quiet():
                path, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise RunError(f"DeepSpeed found no state in {folder}; remove that checkpoint to go on from the one before")

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and buffers of the wiring by name, whole, on the CPU: filled on rank 0, empty elsewhere."""
        wanted, found = set(names), {}
        tensors = {**dict(self._step.model.named_parameters()), **dict(self._step.model.named_buffers())}
        for name, tensor in tensors.items():
            if name in wanted:
                sharded = hasattr(tensor, "ds_id")
                with deepspeed.zero.GatheredParameters([tensor]) if sharded else nullcontext():
                    if dist.get_rank() == 0:
                        whole = tensor.detach().cpu().clone()
                        found[name] = whole.float() if whole.is_floating_point() else whole
        return found


def config(stage: Stage, *, micro_batches: int) -> dict[str, Any]:
    """The stage as DeepSpeed's JSON, with `shard.config` laid over it by dotted path."""
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.budget.micro,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": stage.optim.clip,
        "zero_optimization": {"stage": stage.shard.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": stage.shard.precision == "bf16"},
        "steps_per_print": 10**9,
    }
    for path, value in stage.shard.config.items():
        at = made
        *heads, last = path.split(".")
        for head in heads:
            at = at.setdefault(head, {})
        at[last] = value
    return made


def _groups(step: Step, multipliers: Mapping[str, float], optim: AdamW) -> list[dict[str, Any]]:
    """Parameter groups by (multiplier, decay); vectors (norms, biases) do not decay."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in step.model.named_parameters():
        if name in multipliers:
            decay = optim.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((multipliers[name], decay), []).append(parameter)
    return [{"params": p, "multiplier": m, "weight_decay": d} for (m, d), p in groups.items()]


def _summed(tensor: Tensor) -> Tensor:
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed logs a page at every start; errors still pass."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)
