"""How likely a model and its reference find two answers: what preference learning compares (arXiv:2305.18290, 4).

The reference is the model that the stage started from: with its adapters off where they alone train, else with a
frozen copy of what trains in the place of what has become of that.
"""

# B samples, each with a better and a worse answer: 2B rows, the better ones first  T tokens  V vocabulary

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bridgework.errors import DataError, SpecError
from bridgework.losses.language_modeling import language_modeling
from bridgework.models import lora

Reference = Literal["adapters_off", "frozen_copy"]
LOGITS = frozenset({"logits"})


class FrozenCopy(nn.Module):
    """What trains of a wiring, as it was before the first step: without gradient, without optimizer state.

    A resume checkpoint holds it, for by then what trains has moved; an artifact, of parameters and buffers, does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._start: dict[str, Tensor] = {}

    def take(self, model: nn.Module) -> None:
        """Copy what trains of `model`, the first time. Raises SpecError under ZeRO-3, and where nothing is training."""
        if self._start:
            return
        if not model.training:
            raise SpecError(
                'a frozen copy is what a stage started from, and this model is not training: with model.reference="'
                'frozen_copy" preferences are compared in training alone'
            )
        if any(
            hasattr(parameter, "ds_id") for parameter in model.parameters()
        ):  # DeepSpeed's mark of a split one
            raise SpecError(
                'model.reference="frozen_copy" holds what trains whole on every worker, and ZeRO-3 leaves no parameter '
                'whole: set shard.stage to 2, or train adapters (language.lora) with model.reference="adapters_off"'
            )
        self._start = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """(2B, T, V) of the model as it was."""
        parameters = dict(model.named_parameters())
        self._start = {
            name: tensor.to(parameters[name].device) for name, tensor in self._start.items()
        }
        outputs = functional_call(model, self._start, kwargs={**inputs, "requested": LOGITS})
        return cast(Tensor, outputs.logits_BTV)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination |= {prefix + name: tensor for name, tensor in self._start.items()}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self._start = {
            n.removeprefix(prefix): tensor
            for n, tensor in state_dict.items()
            if n.startswith(prefix)
        }


def compared(
    model: Any,
    logits: Callable[[], Tensor],
    inputs: Mapping[str, Tensor | None],
    copy: FrozenCopy | None,
) -> dict[str, Tensor]:
    """`chosen_B`, `rejected_B` and `chosen_reference_B`, `rejected_reference_B`: nats, summed over an answer's tokens.

    `logits` runs `model.language` and gives (2B, T, V); `inputs` are what `model` was called with. The reference, in
    eval mode, is `copy`; without one it is the model with its adapters off. Raises DataError without labels or for an
    odd number of rows, SpecError where the reference cannot be had.
    """
    labels_BT = inputs["labels"]
    if labels_BT is None or len(labels_BT) % 2:
        rows = "no labels" if labels_BT is None else f"{len(labels_BT)} rows"
        raise DataError(
            f"preferences need the labels of a better and a worse answer of every sample, got {rows}"
        )
    if copy is None:
        _check_adapters_alone_train(model)
    else:
        copy.take(model)
    chosen_B, rejected_B = (-language_modeling(logits(), labels_BT)).chunk(2)
    with torch.no_grad(), _eval_no_grad(model):
        if copy is not None:
            reference_BTV = copy.logits(model, inputs)
        else:
            with lora.disable_adapters(model.language):
                reference_BTV = logits()
        chosen_reference_B, rejected_reference_B = (
            -language_modeling(reference_BTV, labels_BT)
        ).chunk(2)
    return {
        "chosen_B": chosen_B,
        "rejected_B": rejected_B,
        "chosen_reference_B": chosen_reference_B,
        "rejected_reference_B": rejected_reference_B,
    }


def _check_adapters_alone_train(model: nn.Module) -> None:
    others = [n for n, p in model.named_parameters() if p.requires_grad and not lora.is_adapter(n)]
    if model.training and lora.adapter_layers(model) and others:
        raise SpecError(
            f"with its adapters off a model is its own reference only while nothing else trains, and {others[0]} "
            f'does, with {len(others) - 1} more; train {{"language.*lora_*": 1.0}}, or set model.reference='
            '"frozen_copy": it takes the memory of what trains once more'
        )


@contextmanager
def _eval_no_grad(model: nn.Module) -> Iterator[None]:
    """Eval mode for all of it; the modes, which differ from part to part, are put back behind it."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
