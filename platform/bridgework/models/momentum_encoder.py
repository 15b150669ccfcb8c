"""Momentum encoder of a contrastive model, with queues of its keys (MoCo).

He et al. 2020, arXiv:1911.05722, 3.2. All state is in buffers: checkpoints save them, and neither
optimizers nor sharding touch them.
"""

# b rows of a step on this rank  B rows of all ranks  Q entries of the queue  D width

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bridgework.config import config_class
from bridgework.errors import SpecError
from bridgework.losses.gather import gather
from bridgework.system import IGNORE


@config_class
class MomentumConfig:
    """Decay, queue and soft targets; defaults: BLIP (configs/pretrain.yaml).

    Li et al. 2022, arXiv:2201.12086, 3.3 and 4.1.
    """

    decay: float = 0.995  # of the moving average, per step
    queue: int = 57_600  # entries, a multiple of the global batch; 0: none
    alpha: float = 0.4  # share of the momentum encoder in the targets
    ramp: int = 0  # steps in which alpha rises from 0, linearly

    def __post_init__(self) -> None:
        if not (0.0 <= self.decay <= 1.0 and 0.0 <= self.alpha <= 1.0):
            raise SpecError(
                f"momentum.decay and alpha must be in [0, 1], got {self.decay:g} and {self.alpha:g}"
            )
        if self.queue < 0 or self.ramp < 0:
            raise SpecError(
                f"momentum.queue and ramp must be 0 or more, got {self.queue} and {self.ramp}"
            )


class MomentumKeys(NamedTuple):
    """Keys of the momentum encoder for some samples."""

    image_bD: Tensor
    text_bD: Tensor
    identity_b: Tensor  # int64, of the image; below 0: unknown


class MomentumEncoder(nn.Module):
    """Moving average of parameters, queues of its keys and their identities, and a step count.

    All of it stays in float32 when the model is cast, because bfloat16's eight bits would lose a
    step of 0.005.
    """

    image_queue_QD: Tensor
    text_queue_QD: Tensor
    identity_queue_Q: Tensor
    pointer: Tensor
    steps: Tensor

    def __init__(
        self, config: MomentumConfig, parameters: Mapping[str, Tensor], width: int
    ) -> None:
        """Start with a copy of `parameters`, and queues of random unit vectors."""
        super().__init__()
        self.config = config
        self.twin = nn.Module()  # named `twin` in checkpoints
        for name, parameter in parameters.items():
            self.twin.register_buffer(name.replace(".", "/"), parameter.detach().float().clone())
        self.register_buffer("image_queue_QD", normalize(torch.randn(config.queue, width), dim=1))
        self.register_buffer("text_queue_QD", normalize(torch.randn(config.queue, width), dim=1))
        self.register_buffer("identity_queue_Q", torch.full((config.queue,), -1))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("steps", torch.tensor(0))
        self._pending: list[MomentumKeys] = []

    def averaged_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the moving averages by the model's names, for `torch.func.functional_call`."""
        return {
            name.replace("/", "."): buffer.to(dtype) for name, buffer in self.twin.named_buffers()
        }

    def alpha(self) -> Tensor:
        """Return alpha of this step, a scalar."""
        ramp = self.steps / self.config.ramp if self.config.ramp else torch.ones_like(self.steps)
        return self.config.alpha * ramp.clamp(max=1.0)

    def remember(self, keys: MomentumKeys, labels_bT: Tensor | None = None) -> None:
        """Keep keys for the queues until the end of the step.

        Rows without labels, e.g. of an idle rank, are skipped.
        """
        if labels_bT is not None:
            real_b = (labels_bT != IGNORE).any(1)
            keys = MomentumKeys(*(rows[real_b] for rows in keys))
        self._pending.append(keys)

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """Set theta_m to decay * theta_m + (1 - decay) * theta."""
        for name, buffer in self.twin.named_buffers():
            parameter = parameters[name.replace("/", ".")]
            buffer.mul_(decay).add_(parameter.to(buffer.dtype), alpha=1 - decay)

    @torch.no_grad()
    def after_step(self, parameters: Mapping[str, Tensor]) -> None:
        """Update the averages, and replace the oldest queue entries by all ranks' new keys.

        Raises SpecError if the queue is not a multiple of the new keys.
        """
        self.update(parameters, self.config.decay)
        self.steps += 1
        pending, self._pending = self._pending, []
        if self.config.queue and pending:
            columns = zip(*pending, strict=True)
            self._enqueue(MomentumKeys(*(gather(torch.cat(column)).rows_BD for column in columns)))

    def _enqueue(self, keys: MomentumKeys) -> None:
        rows, at = len(keys.identity_b), int(self.pointer)
        if self.config.queue % rows:
            raise SpecError(
                f"momentum.queue {self.config.queue} is not a multiple of "
                f"the {rows} samples of a step. "
                f"Fix: set momentum.queue={max(1, self.config.queue // rows) * rows} "
                "or another budget.batch"
            )
        self.image_queue_QD[at : at + rows] = keys.image_bD.to(self.image_queue_QD)
        self.text_queue_QD[at : at + rows] = keys.text_bD.to(self.text_queue_QD)
        self.identity_queue_Q[at : at + rows] = keys.identity_b
        self.pointer.fill_((at + rows) % self.config.queue)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, but keep float32 (torch calls it for `.to` and `.bfloat16`)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        applied: Self = cast(Any, super())._apply(move, recurse)  # torch leaves it untyped
        return applied
