"""Training engine: the optimizer step and its learning rate, saved state, full weights.

The loss of a step, its counts and its random draws are computed here. Gradients, the optimizer and
the files of its state belong to a backend: DeepSpeed's, or plain torch's on one worker without
ZeRO. Both read each other's files.
"""

# B sequences of a micro-batch  N images  R samples of this rank  L losses  S sources of the mixture

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bridgework import rng
from bridgework.data.collate import Batch
from bridgework.errors import RunError
from bridgework.system import AdamW, Stage, ZeRO
from bridgework.training.step import GradCacheBatch, TrainingModule, by_source

TAG = "state"  # folder of a backend's files in a checkpoint
# of a backend, for a state of another model or other settings
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


class Backend(Protocol):
    """Gradients and optimizer of a module on one rank. All ranks call every method together."""

    device: torch.device
    optimizer: torch.optim.Optimizer

    def forward(self, batch: Batch, cache: GradCacheBatch | None, *, last: bool) -> Tensor:
        """Run the module on a micro-batch in training mode; `last` of the optimizer step."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, which is a summand of the mean over all ranks."""

    def step(self) -> None:
        """After the last micro-batch: clip and apply the gradients, and free them."""

    def grad_norm(self) -> float | None:
        """Return the gradient's norm at the last step over all ranks, or None if unknown."""

    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """Clamp a parameter, in the optimizer's copy too."""

    def shard(self, parameter: nn.Parameter) -> Tensor:
        """Return a trained parameter, or its shard on this rank without the padding."""

    def optimizer_values(self) -> Iterable[Tensor]:
        """Return the tensors of the optimizer's state on this rank, without padding."""

    def complete(self, tensor: Tensor) -> Tensor | None:
        """Gather a parameter or buffer in float32, on the CPU: on rank 0, and None elsewhere."""

    def save(self, folder: Path, client: Mapping[str, Any]) -> None:
        """Write this rank's part of the state into `folder`, without frozen weights."""

    def load(self, folder: Path, *, universal: bool) -> dict[str, Any] | None:
        """Load the state in `folder` and return its `client`, or None if there is none."""


def backend(
    step: TrainingModule, stage: Stage, optimizer: torch.optim.Optimizer, *, universal: bool
) -> Backend:
    """Return plain torch where DeepSpeed has no part: one worker, no ZeRO, no setting of its own.

    Elsewhere DeepSpeed, which takes two seconds to import.
    """
    if dist.get_world_size() == 1 and stage.zero == ZeRO(stage=0, precision="fp32"):
        from bridgework.training.torch_backend import TorchBackend

        return TorchBackend(step, stage, optimizer)
    from bridgework.training.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(step, stage, optimizer, universal=universal)


class Engine:
    """A stage's TrainingModule and its optimizer, on one rank. All ranks call every method together.

    draws: number derived from (seed, step), the same on every rank. With the positions of the
    samples it determines all dropout masks and other random draws of the next `train_step`.
    stop: this rank was asked to stop after the next `train_step`.
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
        """Start the backend.

        multipliers: name of a trained parameter of the wiring -> multiplier of the learning rate.
        universal: default of `load`: its state is the output of `convert_to_universal`.
        """
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
        self._backend = backend(step, stage, optimizer, universal=universal)
        self.device: torch.device = self._backend.device
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
        for group in self._backend.optimizer.param_groups:
            group["lr"] = lr * group["multiplier"]
        samples = [batch for batch in batches if not batch.idle]
        sources_R = torch.tensor([source for batch in samples for source in batch.sources])
        counts_LR, census_3R = self._count(samples)
        local_S = by_source(torch.cat([counts_LR, census_3R]), sources_R, len(self._weights_S))
        local_S = torch.cat([local_S, torch.full_like(local_S[:1], float(self.stop))])
        counts_LS, census_3S, stop_1S = _all_reduce(local_S.to(self.device)).split(
            [len(counts_LR), len(census_3R), 1]
        )
        divisors_LS = counts_LS if self._by_source else counts_LS.sum(1, keepdim=True)
        divisors_LS = divisors_LS.clamp(min=1)
        sums_LR, local_norm = self._forward_backward(batches, sources_R, divisors_LS)
        self._clamp()
        self._step.model.after_step()
        norm = self._backend.grad_norm()
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
        )

    def _forward_backward(
        self, batches: Sequence[Batch], sources_R: Tensor, divisors_LS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward of every micro-batch, and the optimizer's step after the last.

        Returns sums_LR of the rank's samples, and the gradient's norm before the step.
        """
        sums: list[Tensor] = []
        for number, (batch, cache) in enumerate(self._passes(batches), 1):
            last = number == len(batches)
            with _positional_rng(batch, self.draws, self.device):
                sums_LR = self._backend.forward(batch.to(self.device), cache, last=last)
            of_R = torch.tensor(batch.sources) if cache is None else sources_R
            sums_LS = by_source(sums_LR, of_R, len(self._weights_S))
            loss = (self._weights_L @ (self._weights_S * sums_LS / divisors_LS)).sum()
            # The mean is over ranks, but the divisors are already sums over all ranks.
            self._backend.backward(loss * dist.get_world_size())
            norm = self._local_norm()  # before the step, which frees the gradients
            self._backend.step()
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
        """Clamp parameters to the wiring's limits."""
        for name, (low, high) in self._step.model.limits.items():
            self._backend.clamp(self._step.model.get_parameter(name), low, high)

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
        self._backend.save(folder / TAG, client)

    def load(self, folder: Path, *, universal: bool | None = None) -> dict[str, Any]:
        """Load the state that `save` wrote and return its `client`.

        betas, eps and weight decay are those of the stage, not of the state. Raises RunError if
        there is no state, or it does not fit this stage's model or its trained parameters.
        """
        universal = self._universal if universal is None else universal
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self._backend.optimizer.param_groups
        ]
        try:
            client = (
                self._backend.load(folder / TAG, universal=universal)
                if (folder / TAG).is_dir()
                else None
            )
        except torch.OutOfMemoryError:
            raise
        except LOAD_ERRORS as error:
            raise RunError(
                f"{folder}: this checkpoint cannot be loaded into the stage. "
                f"Got {type(error).__name__}: {_first_line(error)}; expected the model, the "
                "trained parameters and the zero settings with which it was written. Fix: "
                "restore these, or start a run from an artifact (starts_from)"
            ) from error
        if client is None:
            raise RunError(
                f"{folder} holds no state. "
                "Fix: remove that checkpoint to resume from the one before"
            )
        for group, own in zip(self._backend.optimizer.param_groups, groups, strict=True):
            group.update(own)  # a fork may change them, and the saved values were loaded
        return client

    def finite(self) -> bool:
        """Return False for a NaN or an infinity in the values of a checkpoint, on any rank.

        These are the trained parameters, the optimizer's state, and the buffers, in which an
        infinity is allowed. Every rank returns the same value.
        """
        numbers = [*self._trained(), *self._backend.optimizer_values()]
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
            own += sum(t.nbytes for t in tensors_in(self._backend.optimizer.state_dict()))
        if dist.get_rank() == 0:
            own += sum(t.nbytes for t in (*self._trained(), *self._step.buffers()))
        return int(_all_reduce(torch.tensor(own, dtype=torch.float64, device=self.device)))

    def _trained(self) -> Iterator[Tensor]:
        for parameter in self._step.parameters():
            if parameter.requires_grad:
                yield self._backend.shard(parameter)

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
            if name in requested and (complete := self._backend.complete(tensor)) is not None:
                gathered[name] = complete
        return gathered


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)


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
