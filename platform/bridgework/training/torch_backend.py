"""Plain torch backend of the engine: one worker, float32, no ZeRO, and no import of DeepSpeed.

Its file has the names and keys of DeepSpeed's without ZeRO: a run that begins here resumes on more
workers, and the other way round.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridgework.data.collate import Batch
from bridgework.system import Stage
from bridgework.training.engine import tensors_in
from bridgework.training.step import GradCacheBatch, TrainingModule

FILE = "mp_rank_00_model_states.pt"
# keys that DeepSpeed expects in its file, next to module, optimizer and the client's
EXPECTED = {
    "lr_scheduler": None,
    "skipped_steps": 0,
    "global_steps": 0,
    "global_samples": 0,
    "dp_world_size": 1,
    "mp_world_size": 1,
}
MODULE, OPTIMIZER = "module", "optimizer"


class TorchBackend:
    """A module and its optimizer; see `engine.Backend`."""

    def __init__(
        self, step: TrainingModule, stage: Stage, optimizer: torch.optim.Optimizer
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.optimizer = optimizer
        self._module = step.to(self.device).train()
        self._clip = stage.optim.clip
        self._last = False
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]

    def forward(self, batch: Batch, cache: GradCacheBatch | None, *, last: bool) -> Tensor:
        self._last = last
        sums_LR: Tensor = self._module(batch, cache)
        return sums_LR

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        if not self._last:
            return
        if self._clip > 0:
            nn.utils.clip_grad_norm_(self._trained, self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def grad_norm(self) -> None:
        return None

    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        parameter.data.clamp_(low, high)

    def shard(self, parameter: nn.Parameter) -> Tensor:
        return parameter

    def optimizer_values(self) -> Iterator[Tensor]:
        return tensors_in(self.optimizer.state_dict())

    def complete(self, tensor: Tensor) -> Tensor:
        copy = tensor.detach().cpu().clone()
        return copy.float() if copy.is_floating_point() else copy

    def save(self, folder: Path, client: Mapping[str, Any]) -> None:
        frozen = {
            name
            for name, parameter in self._module.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad
        }
        module = {n: t for n, t in self._module.state_dict().items() if n not in frozen}
        state = EXPECTED | {MODULE: module, OPTIMIZER: self.optimizer.state_dict()} | dict(client)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / FILE)

    def load(self, folder: Path, *, universal: bool) -> dict[str, Any] | None:
        if universal or not (folder / FILE).is_file():
            return None
        state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        self._module.load_state_dict(state.pop(MODULE), strict=False)
        self.optimizer.load_state_dict(state.pop(OPTIMIZER))
        return dict(state)
