"""The only door to DeepSpeed: ZeRO, the optimizer step, its state on disk, weights gathered from its shards.

The learning rate as a function of the step: linear warm-up, then the decay down to `final_lr`.
"""

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
    """Inside, a module that nobody has imported yet cannot be imported."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = cast(Any, None)
    try:
        yield
    finally:
        del sys.modules[module]


os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with _absent(
    "mlflow"
):  # an optional import of DeepSpeed's autotuner: four seconds in every worker, and not used here
    import deepspeed
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

# DeepSpeed 0.19 still calls what torch 2.13 has renamed, at every step.
warnings.filterwarnings(
    "ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning
)
TAG = "state"  # the folder of DeepSpeed's files in a checkpoint


class StepResult(NamedTuple):
    """What one optimizer step was: float32, over the global batch, and at last of this rank's own samples."""

    losses_L: Tensor  # the mean of every loss
    means_LS: Tensor  # and of its part from every source of the mixture
    counts_LS: Tensor  # what those were divided by
    norm: float  # of the gradient, before clipping
    samples_S: Tensor  # of every source, ...
    tokens_S: Tensor  # ... their tokens, prompts and images included, ...
    replaced_S: Tensor  # ... and how many of them stand for a bad or skipped one
    sums_LR: Tensor  # what each of this rank's samples added to every loss, ...
    counts_LR: Tensor  # ... and to its divisor
    stop: bool = False  # a rank was asked to stop after this step


class Engine:
    """One stage's Step under DeepSpeed, on one rank. All ranks call every method together.

    draws: a number of (seed, step), the same on every rank; with the places of the samples it decides every dropout
    mask and every other draw of the next `train_step`. stop: this rank was asked to stop after the next `train_step`.
    """

    draws: int = 0
    stop: bool = False

    def __init__(
        self,
        step: TrainingModule,
        stage: Stage,
        multipliers: Mapping[str, float],
        *,
        universal: bool = False,
    ) -> None:
        """`multipliers`: what trains -> multiplier of the learning rate, by the names of the wiring's parameters.

        `universal`: it will `load` what `reshaped` made, unless `load` is given another value.
        """
        # Without this, every start on a CPU compiles a C++ extension for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._step = step
        self._universal = universal
        self._optim = stage.optim
        self._sharded = stage.zero.stage > 0  # every rank writes a part of the optimizer's state
        groups = _groups(step, multipliers, stage.optim)
        optim, fused = stage.optim, torch.cuda.is_available()
        optimizer = torch.optim.AdamW(
            groups, lr=optim.peak_lr, betas=optim.betas, eps=optim.eps, fused=fused
        )
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=step,
                optimizer=optimizer,
                config=config(stage) | {"checkpoint": {"load_universal": universal}},
                dist_init_required=False,
            )
        self.device: torch.device = self._engine.device
        own = [source.loss_weight for source in stage.data.leaves]
        self._by_source = None not in own  # a mean for each source, instead of one over all
        self._weights_S = torch.tensor(
            [1.0 if weight is None else weight for weight in own], device=self.device
        )
        self._weights_L = torch.tensor([loss.weight for loss in step.losses], device=self.device)

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over this rank's micro-batches, of which every rank has equally many."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["multiplier"]
        sources_R = torch.tensor(
            [source for batch in batches if not batch.idle for source in batch.sources]
        )
        counts_LR, census_3R = self._counted([batch for batch in batches if not batch.idle])
        known_S = by_source(torch.cat([counts_LR, census_3R]), sources_R, len(self._weights_S))
        known_S = torch.cat([known_S, torch.full_like(known_S[:1], float(self.stop))]).to(
            self.device
        )
        counts_LS, census_3S, stop_1S = _summed(known_S).split([len(counts_LR), len(census_3R), 1])
        divisors_LS = (counts_LS if self._by_source else counts_LS.sum(1, keepdim=True)).clamp(
            min=1
        )
        own_LR, plain = self._learn(batches, sources_R, divisors_LS)
        self._clamp()
        self._step.model.after_step()
        norm = self._engine.get_global_grad_norm()
        total_LS = _summed(by_source(own_LR, sources_R, len(self._weights_S)))
        return StepResult(
            losses_L=(self._weights_S * total_LS / divisors_LS).sum(1),
            means_LS=total_LS / counts_LS.clamp(min=1),
            counts_LS=counts_LS,
            norm=float(plain if norm is None else norm),
            samples_S=census_3S[0],
            tokens_S=census_3S[1],
            replaced_S=census_3S[2],
            sums_LR=own_LR,
            counts_LR=counts_LR,
            stop=bool(stop_1S.any()),
        )

    def _learn(
        self, batches: Sequence[Batch], sources_R: Tensor, divisors_LS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of every micro-batch, the optimizer's step behind the last.

        Gives what each of the rank's samples added to every loss, and the gradient's norm before the step.
        """
        told: list[Tensor] = []
        self._engine.train()
        for number, (batch, beside) in enumerate(self._passes(batches), 1):
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            with to_device(batch, self.draws, self.device):
                sums_LR = self._engine(batch.to(self.device), beside)
            of_R = torch.tensor(batch.sources) if beside is None else sources_R
            sums_LS = by_source(sums_LR, of_R, len(self._weights_S))
            loss = (self._weights_L @ (self._weights_S * sums_LS / divisors_LS)).sum()
            # DeepSpeed averages over ranks; what we divide by is a count over all of them already.
            self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
            plain = self._plain_norm()  # before the step, which drops the gradients
            self._engine.step()
            if beside is not None or not batch.idle:
                told.append(sums_LR.detach())
        return torch.cat(told, dim=1) if beside is None else torch.stack(told).sum(0), plain

    def _counted(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """(L, R) what each sample adds to the divisors of the losses; (3, R) one, its tokens, whether it stands in."""
        tokens_R = torch.cat([batch.tokens_by_sample() for batch in batches]).float()
        replaced_R = torch.tensor(
            [stands_in for batch in batches for stands_in in batch.replaced]
        ).float()
        return self._step.counts(batches), torch.stack(
            [torch.ones_like(tokens_R), tokens_R, replaced_R]
        )

    @torch.no_grad()
    def _clamp(self) -> None:
        """Keeps parameters within the wiring's limits, in the optimizer's copy too: it would bring them back."""
        for name, (low, high) in self._step.model.limits.items():
            parameter = self._step.model.get_parameter(name)
            parameter.data.clamp_(low, high)  # what the next forward reads
            if hasattr(
                parameter, "ds_tensor"
            ):  # ZeRO-3: this rank's part, which no other rank writes
                parameter.ds_tensor.data.clamp_(low, high)
                safe_set_local_fp32_param(
                    parameter, safe_get_local_fp32_param(parameter).clamp(low, high)
                )
            elif (whole := safe_get_full_fp32_param(parameter)) is not None:
                safe_set_full_fp32_param(parameter, whole.clamp(low, high))

    def _passes(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, GradCacheBatch | None]]:
        """Each micro-batch; where losses compare them, with what a first pass gave of all."""
        if len(batches) == 1 or not self._step.cached_outputs:
            yield from ((batch, None) for batch in batches)
            return
        shares = []
        for batch in batches:
            with to_device(batch, self.draws, self.device):  # both passes draw the same
                shares.append(self._step.share(batch.to(self.device)))
        samples = [0 if batch.idle else len(batch.keys) for batch in batches]
        for own, batch in enumerate(batches):
            yield batch, GradCacheBatch(shares, samples, own)

    def _plain_norm(self) -> Tensor:
        """Of the gradients as they lie on the parameters: ZeRO 0 in float32 has them all, and no norm of its own."""
        return nn.utils.get_total_norm(
            [p.grad for p in self._step.parameters() if p.grad is not None]
        )

    def save(self, folder: Path, client: Mapping[str, Any]) -> None:
        """Every rank's part of the resume state under `folder`/state; frozen weights are not in it."""
        with _quiet():
            self._engine.save_checkpoint(
                str(folder),
                tag=TAG,
                client_state=dict(client),
                save_latest=False,
                exclude_frozen_parameters=True,
            )

    def load(self, folder: Path, *, universal: bool | None = None) -> dict[str, Any]:
        """Load what `save` wrote and return its `client`; betas, eps and weight decay stay those of the stage.

        Raises RunError when there is no state, or it does not fit this stage's model or what trains of it.
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
            except (
                RuntimeError,
                ValueError,
                LookupError,
                AssertionError,
                AttributeError,
                TypeError,
            ) as error:
                raise RunError(
                    f"{folder}: DeepSpeed cannot load this checkpoint into the stage. Got {type(error).__name__}: "
                    f"{_first_line(error)}; expected the model, what trains, and the shard settings that it was "
                    "written with. Fix: bring these back, or start a run from an artifact (starts_from)"
                ) from error
        if path is None:
            raise RunError(
                f"DeepSpeed found no state in {folder}; remove that checkpoint to resume from the one before"
            )
        for group, own in zip(self._engine.optimizer.param_groups, groups, strict=True):
            group.update(own)  # a fork may change them; a state of DeepSpeed brings its own
        if universal:
            self._load_beside(folder / TAG)
        return dict(client)

    def finite(self) -> bool:
        """Check all that a checkpoint holds, on every rank: no NaN or infinity in what trains or in its optimizer's
        state, no NaN in a buffer. Every rank gets the same answer."""
        numbers = [*self._learned(), *_tensors(self._engine.optimizer.state_dict())]
        sound = all(
            bool(tensor.isfinite().all()) for tensor in numbers if tensor.is_floating_point()
        )
        sound = sound and not any(
            bool(b.isnan().any()) for b in self._step.buffers() if b.is_floating_point()
        )
        wrong = _summed(torch.tensor(float(not sound), device=self.device))
        return not bool(wrong)

    def checkpoint_bytes(self) -> int:
        """Estimate the bytes of a checkpoint, over all ranks."""
        own = 0
        if self._sharded or dist.get_rank() == 0:
            own += sum(t.nbytes for t in _tensors(self._engine.optimizer.state_dict()))
        if dist.get_rank() == 0:
            own += sum(t.nbytes for t in (*self._learned(), *self._step.buffers()))
        return int(_summed(torch.tensor(own, dtype=torch.float64, device=self.device)))

    def _learned(self) -> Iterator[Tensor]:
        """Yield the parameters that train, as far as they are on this rank."""
        for parameter in self._step.parameters():
            if parameter.requires_grad:
                yield getattr(parameter, "ds_tensor", parameter)

    def _load_beside(self, state: Path) -> None:
        """What the module has beside parameters, equal on all ranks: of a universal state DeepSpeed leaves it out."""
        saved = torch.load(
            min(state.glob("*model_states.pt")), map_location="cpu", weights_only=True
        )["module"]
        learned = {name for name, _ in self._step.named_parameters(remove_duplicate=False)}
        self._step.load_state_dict(
            {n: tensor for n, tensor in saved.items() if n not in learned}, strict=False
        )

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and buffers of the wiring by name, whole, on the CPU: filled on rank 0, empty elsewhere."""
        wanted, found = set(names), {}
        tensors = {
            **dict(self._step.model.named_parameters()),
            **dict(self._step.model.named_buffers()),
        }
        for name, tensor in tensors.items():
            if name in wanted:
                sharded = hasattr(tensor, "ds_id")
                # with bfloat16, what was learned is in the optimizer's copy, of which the weights are a rounding
                exact = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
                if exact is not None:
                    if dist.get_rank() == 0:
                        found[name] = exact.detach().cpu().clone()
                    continue
                with deepspeed.zero.GatheredParameters([tensor]) if sharded else nullcontext():
                    if dist.get_rank() == 0:
                        whole = tensor.detach().cpu().clone()
                        found[name] = whole.float() if whole.is_floating_point() else whole
        return found


def convert_to_universal(folder: Path, into: Path) -> None:
    """Make the state under `folder`, of any number of ranks, into one that any other number can load.

    DeepSpeed's universal checkpoint (arXiv:2406.18820). Raises RunError when it cannot be made.
    """
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--inject_missing_state",
    ]
    places = ["--input_folder", str(folder / TAG), "--output_folder", str(into / TAG)]
    done = subprocess.run([*command, *places], capture_output=True, text=True)
    if done.returncode:
        if any(word in done.stderr for word in storage.SAID):
            raise storage.full(into)
        said = done.stderr.strip().splitlines() or ["no word"]
        raise RunError(f"{folder} cannot be read by another number of workers: {said[-1]}")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings and sequences."""
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


def config(stage: Stage) -> dict[str, Any]:
    """The stage as DeepSpeed's JSON, with `shard.config` laid over it by dotted path.

    Where a step ends is told to DeepSpeed at every micro-batch: with packing, steps have more or fewer of them.
    """
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.budget.micro,
        "gradient_clipping": stage.optim.clip,
        "zero_optimization": {"stage": stage.zero.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": stage.zero.precision == "bf16"},
        "steps_per_print": 10**9,
    }
    for path, value in stage.zero.config.items():
        at = made
        *heads, last = path.split(".")
        for head in heads:
            at = at.setdefault(head, {})
        at[last] = value
    return made


def _groups(
    step: TrainingModule, multipliers: Mapping[str, float], optim: AdamW
) -> list[dict[str, Any]]:
    """Parameter groups by (multiplier, decay); vectors (norms, biases) do not decay."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in step.model.named_parameters():
        if name in multipliers:
            decay = optim.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((multipliers[name], decay), []).append(parameter)
    return [{"params": p, "multiplier": m, "weight_decay": d} for (m, d), p in groups.items()]


@contextmanager
def to_device(batch: Batch, draws: int, device: torch.device) -> Iterator[None]:
    """Inside, a forward of `batch` draws by the places of its samples; what `rng` does not know, by the first's."""
    places_B = torch.arange(len(batch.ids_BT)) if batch.places_B is None else batch.places_B
    owners_N = torch.zeros(0, dtype=torch.int64) if batch.owners_N is None else batch.owners_N
    torch.manual_seed(rng.derive(draws, int(places_B[0])))
    with rng.Placed(draws, places_B.to(device), owners_N.to(device)):
        yield


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


def learning_rate(optim: AdamW, step: int, steps: int) -> float:
    """The rate of `step`, counted from 0, in a stage of `steps`; the first step already moves."""
    warmup = math.ceil(optim.warmup * steps - 1e-9)  # 2,000 / n of n steps are 2,000, whatever n
    if step < warmup:
        return optim.peak_lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if optim.decay == "constant":
        return optim.peak_lr
    if optim.decay == "exponential":
        return float(optim.peak_lr * (optim.final_lr / optim.peak_lr) ** progress)
    return optim.final_lr + (optim.peak_lr - optim.final_lr) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )
