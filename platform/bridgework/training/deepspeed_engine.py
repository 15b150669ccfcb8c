"""DeepSpeed engine: ZeRO, the optimizer step and its learning rate, saved state, full weights.

No other module imports DeepSpeed.
"""

# B sequences of a micro-batch  N images  R samples of this rank  L losses  S sources of the mixture

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bridgework import rng, storage
from bridgework.data.collate import Batch
from bridgework.errors import RunError
from bridgework.system import AdamW, Stage
from bridgework.training.step import GradCacheBatch, TrainingModule, by_source


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
        safe_get_full_fp32_param,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

# At every step, DeepSpeed 0.19 calls functions that torch 2.13 has renamed.
warnings.filterwarnings(
    "ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning
)
TAG = "state"  # folder of DeepSpeed's files in a checkpoint
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
# of DeepSpeed, for a state of another model or other settings
LOAD_ERRORS = (
    RuntimeError,
    ValueError,
    LookupError,
    AssertionError,
    AttributeError,
    TypeError,
)


class StepResult(NamedTuple):
    """Result of one optimizer step.

    Tensors are float32 and summed or averaged over all ranks, except the per-rank `_LR` ones.
    """

    losses_L: Tensor  # mean of every loss
    means_LS: Tensor  # mean of every loss over the samples of each source
    counts_LS: Tensor  # divisors of `means_LS`
    norm: float  # of the gradient, before clipping
    samples_S: Tensor  # number of samples
    tokens_S: Tensor  # number of their tokens, prompts and images included
    replaced_S: Tensor  # number of samples that replace a bad or skipped one
    sums_LR: Tensor  # summand of each of this rank's samples in every loss
    counts_LR: Tensor  # contribution of each of this rank's samples to the divisor
    stop: bool = False  # a rank was asked to stop after this step
    save: bool = False  # a rank was asked for a checkpoint after this step


def learning_rate(optim: AdamW, step: int, steps: int) -> float:
    """Return the learning rate of `step`, counted from 0, in a stage of `steps` steps.

    A linear warm-up, then the decay to `final_lr`. The rate of the first step is above 0.
    """
    # The margin makes a share of 2,000 / n exactly 2,000 steps for every n.
    warmup = math.ceil(optim.warmup * steps - 1e-9)
    if step < warmup:
        return optim.peak_lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if optim.decay == "constant":
        return optim.peak_lr
    if optim.decay == "exponential":
        return float(optim.peak_lr * (optim.final_lr / optim.peak_lr) ** progress)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.final_lr + (optim.peak_lr - optim.final_lr) * cosine


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


class Engine:
    """A stage's TrainingModule under DeepSpeed, on one rank. All ranks call every method together.

    draws: number derived from (seed, step), the same on every rank. With the positions of the
    samples it determines all dropout masks and other random draws of the next `train_step`.
    stop: this rank was asked to stop after the next `train_step`.
    save_due: this rank was asked for a checkpoint after the next `train_step`.
    """

    draws: int = 0
    stop: bool = False
    save_due: bool = False

    def __init__(
        self,
        step: TrainingModule,
        stage: Stage,
        multipliers: Mapping[str, float],
        *,
        universal: bool = False,
    ) -> None:
        """Initialize DeepSpeed.

        multipliers: name of a trained parameter of the wiring -> multiplier of the learning rate.
        universal: default of `load`: its state is the output of `convert_to_universal`.
        """
        # Without this, every start on a CPU compiles a C++ extension for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._step = step
        self._universal = universal
        self._optim = stage.optim
        self._sharded = stage.zero.stage > 0  # every rank writes a part of the optimizer's state
        optim = stage.optim
        optimizer = torch.optim.AdamW(
            _groups(step, multipliers, optim),
            lr=optim.peak_lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=torch.cuda.is_available(),
        )
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=step,
                optimizer=optimizer,
                config=config(stage) | {"checkpoint": {"load_universal": universal}},
                dist_init_required=False,
            )
        self.device: torch.device = self._engine.device
        loss_weights = [source.loss_weight for source in stage.data.leaves]
        self._by_source = (
            None not in loss_weights
        )  # a mean for each source, instead of one over all
        self._weights_S = torch.tensor(
            [1.0 if weight is None else weight for weight in loss_weights], device=self.device
        )
        self._weights_L = torch.tensor([loss.weight for loss in step.losses], device=self.device)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Do one optimizer step over this rank's micro-batches; every rank has the same number."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["multiplier"]
        samples = [batch for batch in batches if not batch.idle]
        sources_R = torch.tensor([source for batch in samples for source in batch.sources])
        counts_LR, census_3R = self._count(samples)
        local_S = by_source(torch.cat([counts_LR, census_3R]), sources_R, len(self._weights_S))
        asked = [torch.full_like(local_S[:1], float(each)) for each in (self.stop, self.save_due)]
        local_S = torch.cat([local_S, *asked])
        counts_LS, census_3S, stop_1S, save_1S = _all_reduce(local_S.to(self.device)).split(
            [len(counts_LR), len(census_3R), 1, 1]
        )
        divisors_LS = counts_LS if self._by_source else counts_LS.sum(1, keepdim=True)
        divisors_LS = divisors_LS.clamp(min=1)
        sums_LR, local_norm = self._forward_backward(batches, sources_R, divisors_LS)
        self._clamp()
        self._step.model.after_step()
        norm = self._engine.get_global_grad_norm()
        total_LS = _all_reduce(by_source(sums_LR, sources_R, len(self._weights_S)))
        return StepResult(
            losses_L=(self._weights_S * total_LS / divisors_LS).sum(1),
            means_LS=total_LS / counts_LS.clamp(min=1),
            counts_LS=counts_LS,
            norm=float(local_norm if norm is None else norm),
            samples_S=census_3S[0],
            tokens_S=census_3S[1],
            replaced_S=census_3S[2],
            sums_LR=sums_LR,
            counts_LR=counts_LR,
            stop=bool(stop_1S.any()),
            save=bool(save_1S.any()),
        )

    def _forward_backward(
        self, batches: Sequence[Batch], sources_R: Tensor, divisors_LS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward of every micro-batch, and the optimizer's step after the last.

        Returns sums_LR of the rank's samples, and the gradient's norm before the step.
        """
        sums: list[Tensor] = []
        self._engine.train()
        for number, (batch, cache) in enumerate(self._passes(batches), 1):
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            with _positional_rng(batch, self.draws, self.device):
                sums_LR = self._engine(batch.to(self.device), cache)
            of_R = torch.tensor(batch.sources) if cache is None else sources_R
            sums_LS = by_source(sums_LR, of_R, len(self._weights_S))
            loss = (self._weights_L @ (self._weights_S * sums_LS / divisors_LS)).sum()
            # DeepSpeed averages over ranks, but the divisors are already sums over all ranks.
            self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
            norm = self._local_norm()  # before the step, which frees the gradients
            self._engine.step()
            if cache is not None or not batch.idle:
                sums.append(sums_LR.detach())
        return torch.cat(sums, dim=1) if cache is None else torch.stack(sums).sum(0), norm

    def _count(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Return counts_LR, the samples' contributions to the divisors, and a (3, R) census.

        Rows of the census: 1, the number of tokens, and 1 if the sample replaces another.
        """
        tokens_R = torch.cat([batch.tokens_by_sample() for batch in batches]).float()
        replaced_R = torch.tensor([r for batch in batches for r in batch.replaced]).float()
        census_3R = torch.stack([torch.ones_like(tokens_R), tokens_R, replaced_R])
        return self._step.counts(batches), census_3R

    @torch.no_grad()
    def _clamp(self) -> None:
        """Clamp parameters to the wiring's limits, in the optimizer's copy too.

        The optimizer's next step would otherwise restore the old values from its copy.
        """
        for name, (low, high) in self._step.model.limits.items():
            parameter = self._step.model.get_parameter(name)
            parameter.data.clamp_(low, high)  # read by the next forward
            if hasattr(parameter, "ds_tensor"):  # ZeRO 3: the part that only this rank writes
                parameter.ds_tensor.data.clamp_(low, high)
                clamped = safe_get_local_fp32_param(parameter).clamp(low, high)
                safe_set_local_fp32_param(parameter, clamped)
            elif (master := safe_get_full_fp32_param(parameter)) is not None:
                safe_set_full_fp32_param(parameter, master.clamp(low, high))

    def _passes(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, GradCacheBatch | None]]:
        """Yield the micro-batches; if losses compare them, with the outputs of a first pass."""
        if len(batches) == 1 or not self._step.cached_outputs:
            yield from ((batch, None) for batch in batches)
            return
        shares = []
        for batch in batches:
            with _positional_rng(batch, self.draws, self.device):  # both passes draw the same
                shares.append(self._step.share(batch.to(self.device)))
        samples = [0 if batch.idle else len(batch.keys) for batch in batches]
        for own, batch in enumerate(batches):
            yield batch, GradCacheBatch(shares, samples, own)

    def _local_norm(self) -> Tensor:
        """Return the norm of the parameters' gradients: ZeRO 0 in float32 reports none itself."""
        return nn.utils.get_total_norm(
            [p.grad for p in self._step.parameters() if p.grad is not None]
        )

    def save(self, folder: Path, client: Mapping[str, Any]) -> None:
        """Write this rank's part of the state under `folder`/state, without frozen weights."""
        with _quiet():
            self._engine.save_checkpoint(
                str(folder),
                tag=TAG,
                client_state=dict(client),
                save_latest=False,
                exclude_frozen_parameters=True,
            )

    def load(self, folder: Path, *, universal: bool | None = None) -> dict[str, Any]:
        """Load the state that `save` wrote and return its `client`.

        betas, eps and weight decay are those of the stage, not of the state. Raises RunError if
        there is no state, or it does not fit this stage's model or its trained parameters.
        """
        universal = self._universal if universal is None else universal
        self._engine._config.load_universal_checkpoint = universal
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self._engine.optimizer.param_groups
        ]
        path, client = None, {}
        if (folder / TAG).is_dir():
            try:
                with _quiet():
                    path, client = self._engine.load_checkpoint(
                        str(folder), tag=TAG, load_module_strict=False
                    )
            except torch.OutOfMemoryError:
                raise
            except LOAD_ERRORS as error:
                raise RunError(
                    f"{folder}: DeepSpeed cannot load this checkpoint into the stage. "
                    f"Got {type(error).__name__}: {_first_line(error)}; expected the model, the "
                    "trained parameters and the zero settings with which it was written. Fix: "
                    "restore these, or start a run from an artifact (starts_from)"
                ) from error
        if path is None:
            raise RunError(
                f"{folder}: DeepSpeed found no state there. "
                "Fix: remove that checkpoint to resume from the one before"
            )
        for group, own in zip(self._engine.optimizer.param_groups, groups, strict=True):
            group.update(own)  # a fork may change them, and DeepSpeed loads the saved values
        if universal:
            self._load_buffers(folder / TAG)
        return dict(client)

    def finite(self) -> bool:
        """Return False for a NaN or an infinity in the values of a checkpoint, on any rank.

        These are the trained parameters, the optimizer's state, and the buffers, in which an
        infinity is allowed. Every rank returns the same value.
        """
        numbers = [*self._trained(), *self._optimizer_values()]
        ok = all(bool(tensor.isfinite().all()) for tensor in numbers if tensor.is_floating_point())
        ok = ok and not any(
            bool(b.isnan().any()) for b in self._step.buffers() if b.is_floating_point()
        )
        wrong = _all_reduce(torch.tensor(float(not ok), device=self.device))
        return not bool(wrong)

    def checkpoint_bytes(self) -> int:
        """Return an estimate of the bytes of a checkpoint, over all ranks."""
        own = 0
        if self._sharded or dist.get_rank() == 0:
            own += sum(t.nbytes for t in _tensors(self._engine.optimizer.state_dict()))
        if dist.get_rank() == 0:
            own += sum(t.nbytes for t in (*self._trained(), *self._step.buffers()))
        return int(_all_reduce(torch.tensor(own, dtype=torch.float64, device=self.device)))

    def _trained(self) -> Iterator[Tensor]:
        """Yield the trained parameters, or their shards on this rank without the padding."""
        for parameter in self._step.parameters():
            if parameter.requires_grad:
                shard = getattr(parameter, "ds_tensor", None)
                yield parameter if shard is None else shard[: _shard_size(parameter)]

    def _optimizer_values(self) -> Iterator[Tensor]:
        """Yield the tensors of the optimizer's state on this rank.

        The shards of ZeRO 3 have one size on all ranks. DeepSpeed never writes the padding of the
        last one, which therefore holds any bits, NaN among them: it is left out.
        """
        optimizer = self._engine.optimizer
        if not hasattr(optimizer, "get_local_fp32_param"):
            yield from _tensors(optimizer.state_dict())
            return
        for parameter in self._step.parameters():
            if parameter.requires_grad:
                size = _shard_size(parameter)
                for key in (None, *MOMENTS):
                    yield optimizer.get_local_fp32_param(parameter, key)[:size]

    def _load_buffers(self, state: Path) -> None:
        """Load the buffers, equal on all ranks, which DeepSpeed skips in a universal state."""
        saved = torch.load(
            min(state.glob("*model_states.pt")), map_location="cpu", weights_only=True
        )["module"]
        parameters = {name for name, _ in self._step.named_parameters(remove_duplicate=False)}
        self._step.load_state_dict(
            {n: tensor for n, tensor in saved.items() if n not in parameters}, strict=False
        )

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Gather parameters and buffers of the wiring by name, on the CPU.

        Returns them on rank 0, and an empty dict on the others.
        """
        requested, gathered = set(names), {}
        tensors = {
            **dict(self._step.model.named_parameters()),
            **dict(self._step.model.named_buffers()),
        }
        for name, tensor in tensors.items():
            if name in requested:
                sharded = hasattr(tensor, "ds_id")
                # With bfloat16, the weights are rounded from the optimizer's exact float32 copy.
                exact = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
                if exact is not None:
                    if dist.get_rank() == 0:
                        gathered[name] = exact.detach().cpu().clone()
                    continue
                with deepspeed.zero.GatheredParameters([tensor]) if sharded else nullcontext():
                    if dist.get_rank() == 0:
                        copy = tensor.detach().cpu().clone()
                        gathered[name] = copy.float() if copy.is_floating_point() else copy
        return gathered


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


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _groups(
    step: TrainingModule, multipliers: Mapping[str, float], optim: AdamW
) -> list[dict[str, Any]]:
    """Return parameter groups by (multiplier, decay); vectors (norms, biases) do not decay."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in step.model.named_parameters():
        if name in multipliers:
            decay = optim.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((multipliers[name], decay), []).append(parameter)
    return [{"params": p, "multiplier": m, "weight_decay": d} for (m, d), p in groups.items()]


@contextmanager
def _positional_rng(batch: Batch, draws: int, device: torch.device) -> Iterator[None]:
    """Make random draws in the block depend on the positions of the samples in the global batch.

    Draws that `rng` does not replace are seeded by the position of the first sample.
    """
    places_B = torch.arange(len(batch.ids_BT)) if batch.places_B is None else batch.places_B
    owners_N = torch.zeros(0, dtype=torch.int64) if batch.owners_N is None else batch.owners_N
    torch.manual_seed(rng.derive(draws, int(places_B[0])))
    with rng.Placed(draws, places_B.to(device), owners_N.to(device)):
        yield


def _all_reduce(tensor: Tensor) -> Tensor:
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress DeepSpeed's log in the block, e.g. a page at every start, except for errors."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)
