"""The momentum twin of a contrastive model, and the queues of what it saw (He et al. 2020, arXiv:1911.05722, 3.2).

All of it is buffers: a checkpoint keeps them, no optimizer and no sharding touches them.
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
    """The defaults are BLIP's (configs/pretrain.yaml; Li et al. 2022, arXiv:2201.12086, 3.3 and 4.1)."""

    decay: float = 0.995  # what the twin keeps of itself at every step
    queue: int = 57_600  # entries; 0: none. A multiple of the global batch
    alpha: float = 0.4  # share of the twin's opinion in the targets
    ramp: int = 0  # steps in which alpha rises from 0, linearly

    def __post_init__(self) -> None:
        if not (0.0 <= self.decay <= 1.0 and 0.0 <= self.alpha <= 1.0):
            raise SpecError(
                f"momentum.decay and alpha lie in [0, 1], got {self.decay:g} and {self.alpha:g}"
            )
        if self.queue < 0 or self.ramp < 0:
            raise SpecError(
                f"momentum.queue and ramp are 0 or more, got {self.queue} and {self.ramp}"
            )


class Keys(NamedTuple):
    """What the twin makes of some samples."""

    image_bD: Tensor
    text_bD: Tensor
    identity_b: Tensor  # int64: of the image; below 0 it is not known


class MomentumEncoder(nn.Module):
    """A twin of some parameters, two queues of its vectors and one of identities, and the count of steps.

    All stays in float32, whatever the model is cast to: a step of 0.005 would be lost in bfloat16's eight bits.
    """

    image_queue_QD: Tensor
    text_queue_QD: Tensor
    identity_queue_Q: Tensor
    pointer: Tensor
    steps: Tensor

    def __init__(
        self, config: MomentumConfig, parameters: Mapping[str, Tensor], width: int
    ) -> None:
        """A twin that is equal to `parameters`; queues of drawn vectors of length 1."""
        super().__init__()
        self.config = config
        self.twin = nn.Module()
        for name, parameter in parameters.items():
            self.twin.register_buffer(name.replace(".", "/"), parameter.detach().float().clone())
        self.register_buffer("image_queue_QD", normalize(torch.randn(config.queue, width), dim=1))
        self.register_buffer("text_queue_QD", normalize(torch.randn(config.queue, width), dim=1))
        self.register_buffer("identity_queue_Q", torch.full((config.queue,), -1))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("steps", torch.tensor(0))
        self._seen: list[Keys] = []

    def parameters_of_twin(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """By the names of the model's own, for `torch.func.functional_call`."""
        return {
            name.replace("/", "."): buffer.to(dtype) for name, buffer in self.twin.named_buffers()
        }

    def alpha(self) -> Tensor:
        """Of this step: a scalar."""
        risen = self.steps / self.config.ramp if self.config.ramp else torch.ones_like(self.steps)
        return self.config.alpha * risen.clamp(max=1.0)

    def see(self, keys: Keys, labels_bT: Tensor | None = None) -> None:
        """Remember what goes into the queues behind the step: of rows without any label (an idle rank's) nothing."""
        if labels_bT is not None:
            real_b = (labels_bT != IGNORE).any(1)
            keys = Keys(*(rows[real_b] for rows in keys))
        self._seen.append(keys)

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """theta_m <- decay * theta_m + (1 - decay) * theta, exactly."""
        for name, buffer in self.twin.named_buffers():
            buffer.mul_(decay).add_(
                parameters[name.replace("/", ".")].to(buffer.dtype), alpha=1 - decay
            )

    @torch.no_grad()
    def after_step(self, parameters: Mapping[str, Tensor]) -> None:
        """The twin moves towards the model, and what all ranks saw in this step takes the oldest places of the queues.

        Raises SpecError when the queue is no multiple of what came.
        """
        self.follow(parameters, self.config.decay)
        self.steps += 1
        seen, self._seen = self._seen, []
        if self.config.queue and seen:
            self._enqueue(
                Keys(*(gather(torch.cat(parts)).rows_BD for parts in zip(*seen, strict=True)))
            )

    def _enqueue(self, keys: Keys) -> None:
        rows, at = len(keys.identity_b), int(self.pointer)
        if self.config.queue % rows:
            raise SpecError(
                f"momentum.queue {self.config.queue} is not a multiple of the {rows} samples of a step; "
                f"set momentum.queue={max(1, self.config.queue // rows) * rows} or another budget.batch"
            )
        self.image_queue_QD[at : at + rows] = keys.image_bD.to(self.image_queue_QD)
        self.text_queue_QD[at : at + rows] = keys.text_bD.to(self.text_queue_QD)
        self.identity_queue_Q[at : at + rows] = keys.identity_b
        self.pointer.fill_((at + rows) % self.config.queue)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        applied: Self = cast(Any, super())._apply(moved, recurse)  # torch leaves it untyped
        return applied
