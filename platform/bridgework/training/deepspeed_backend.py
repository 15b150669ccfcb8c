"""DeepSpeed backend of the engine: ZeRO, bfloat16, and state that any number of workers loads.

No other module imports DeepSpeed.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bridgework import storage
from bridgework.data.collate import Batch
from bridgework.errors import RunError
from bridgework.system import Stage
from bridgework.training.engine import TAG, tensors_in
from bridgework.training.step import GradCacheBatch, TrainingModule


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Make a module that is not imported yet fail to import inside the block."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = cast(Any, None)
    try:
        yield
    finally:
        del sys.modules[module]


os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# MLflow is an optional import of DeepSpeed's autotuner: unused here, and 4 seconds in every worker.
with _absent("mlflow"):
    import deepspeed
    from deepspeed.utils import (
        logger,
        safe_get_full_fp32_param,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

# At every step, DeepSpeed 0.19 calls functions that torch 2.13 has renamed.
warnings.filterwarnings(
    "ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning
)
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def config(stage: Stage) -> dict[str, Any]:
    """Return DeepSpeed's JSON config of a stage, overridden by `zero.config` by dotted path.

    It has no number of accumulation steps, because packing varies the number of micro-batches. The
    engine marks the last micro-batch of every step instead.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.budget.micro,
        "gradient_clipping": stage.optim.clip,
        "zero_optimization": {"stage": stage.zero.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": stage.zero.precision == "bf16"},
        "steps_per_print": 10**9,
    }
    for path, value in stage.zero.config.items():
        at = settings
        *heads, last = path.split(".")
        for head in heads:
            at = at.setdefault(head, {})
        at[last] = value
    return settings


class DeepSpeedBackend:
    """A module and its optimizer under DeepSpeed; see `engine.Backend`."""

    def __init__(
        self,
        step: TrainingModule,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        *,
        universal: bool,
    ) -> None:
        """Initialize DeepSpeed.

        universal: the state to load is the output of `convert_to_universal`.
        """
        # Without this, every start on a CPU compiles a C++ extension for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._module = step
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=step,
                optimizer=optimizer,
                config=config(stage) | {"checkpoint": {"load_universal": universal}},
                dist_init_required=False,
            )
        self.device: torch.device = self._engine.device
        self.optimizer = self._engine.optimizer

    def forward(self, batch: Batch, cache: GradCacheBatch | None, *, last: bool) -> Tensor:
        self._engine.train()
        self._engine.set_gradient_accumulation_boundary(last)
        sums_LR: Tensor = self._engine(batch, cache)
        return sums_LR

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        self._engine.step()

    def grad_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        # The optimizer's next step would otherwise restore the old values from its copy.
        parameter.data.clamp_(low, high)  # read by the next forward
        shard = getattr(parameter, "ds_tensor", None)
        if shard is not None:  # ZeRO 3: the part that only this rank writes
            shard.data.clamp_(low, high)
            clamped = safe_get_local_fp32_param(parameter).clamp(low, high)
            safe_set_local_fp32_param(parameter, clamped)
        elif (master := safe_get_full_fp32_param(parameter)) is not None:
            safe_set_full_fp32_param(parameter, master.clamp(low, high))

    def shard(self, parameter: nn.Parameter) -> Tensor:
        shard = getattr(parameter, "ds_tensor", None)
        return parameter if shard is None else shard[: _shard_size(parameter)]

    def optimizer_values(self) -> Iterator[Tensor]:
        # The shards of ZeRO 3 have one size on all ranks. DeepSpeed never writes the padding of the
        # last one, which therefore holds any bits, NaN among them: it is left out.
        if not hasattr(self.optimizer, "get_local_fp32_param"):
            yield from tensors_in(self.optimizer.state_dict())
            return
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                size = _shard_size(parameter)
                for key in (None, *MOMENTS):
                    yield self.optimizer.get_local_fp32_param(parameter, key)[:size]

    def complete(self, tensor: Tensor) -> Tensor | None:
        first = dist.get_rank() == 0
        # With bfloat16, the weights are rounded from the optimizer's exact float32 copy.
        exact = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
        if exact is not None:
            return exact.detach().cpu().clone() if first else None
        sharded = hasattr(tensor, "ds_id")
        with deepspeed.zero.GatheredParameters([tensor]) if sharded else nullcontext():
            if not first:
                return None
            copy = tensor.detach().cpu().clone()
            return copy.float() if copy.is_floating_point() else copy

    def save(self, folder: Path, client: Mapping[str, Any]) -> None:
        with _quiet():
            self._engine.save_checkpoint(
                str(folder.parent),
                tag=folder.name,
                client_state=dict(client),
                save_latest=False,
                exclude_frozen_parameters=True,
            )

    def load(self, folder: Path, *, universal: bool) -> dict[str, Any] | None:
        self._engine._config.load_universal_checkpoint = universal
        with _quiet():
            path, client = self._engine.load_checkpoint(
                str(folder.parent), tag=folder.name, load_module_strict=False
            )
        if path is None:
            return None
        if universal:
            self._load_buffers(folder)
        return dict(client)

    def _load_buffers(self, state: Path) -> None:
        """Load the buffers, equal on all ranks, which DeepSpeed skips in a universal state."""
        saved = torch.load(
            min(state.glob("*model_states.pt")), map_location="cpu", weights_only=True
        )["module"]
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        self._module.load_state_dict(
            {n: tensor for n, tensor in saved.items() if n not in parameters}, strict=False
        )


def convert_to_universal(folder: Path, into: Path) -> None:
    """Convert the state under `folder` to one that any number of ranks can load.

    This is DeepSpeed's universal checkpoint (arXiv:2406.18820). Raises RunError if it fails.
    """
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
    ]
    folders = ["--input_folder", str(folder / TAG), "--output_folder", str(into / TAG)]
    done = subprocess.run([*command, *folders], capture_output=True, text=True)
    if done.returncode:
        if any(text in done.stderr for text in storage.FULL_MESSAGES):
            raise storage.full(into)
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RunError(f"{folder} cannot be read by another number of workers. Got {lines[-1]}")


def _shard_size(parameter: Any) -> int:
    """Return the elements of a ZeRO 3 parameter that its shard on this rank holds."""
    shard = parameter.ds_tensor.numel()
    return int(min(max(parameter.ds_numel - dist.get_rank() * shard, 0), shard))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress DeepSpeed's log in the block, e.g. a page at every start, except for errors."""
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)
