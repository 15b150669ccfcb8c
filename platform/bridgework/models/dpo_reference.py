"""Log-likelihoods of two answers under a model and its reference, for DPO (arXiv:2305.18290, 4).

The reference is the model that the stage started from: the model with its adapters off if they
alone train, else the model with a frozen copy of the parameters that train.
"""

# B samples, each with a better and a worse answer: 2B rows, the better ones first  T tokens
# V vocabulary

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.func import functional_call

from bridgework.errors import DataError, SpecError
from bridgework.losses.language_modeling import language_modeling
from bridgework.models import lora
from bridgework.models.base import eval_no_grad

Reference = Literal["adapters_off", "frozen_copy"]
LOGITS = frozenset({"logits"})


class FrozenCopy(nn.Module):
    """Copy of the trainable parameters from before the first step, without optimizer state.

    A resume checkpoint holds it, because the trained parameters have changed by then. An artifact,
    which has parameters and buffers, does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._start: dict[str, Tensor] = {}

    def take(self, model: nn.Module) -> None:
        """Copy the trainable parameters of `model` on the first call.

        Raises SpecError under ZeRO-3, and for a model in eval mode.
        """
        if self._start:
            return
        if not model.training:
            raise SpecError(
                'model.reference="frozen_copy" is the start of a stage, and this model is in eval '
                "mode: preferences are compared in training alone"
            )
        # DeepSpeed marks parameters that it splits
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise SpecError(
                'model.reference="frozen_copy" needs complete parameters on every worker, and '
                "ZeRO-3 splits them. Fix: set zero.stage to 2, or train adapters (language.lora) "
                'with model.reference="adapters_off"'
            )
        self._start = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """Return (2B, T, V), the logits of the model with the copied parameters."""
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


def log_likelihoods(
    model: Any,
    logits: Callable[[], Tensor],
    inputs: Mapping[str, Tensor | None],
    copy: FrozenCopy | None,
) -> dict[str, Tensor]:
    """Return log-likelihoods of better and worse answers, of the model and of its reference.

    These are `chosen_B`, `rejected_B`, `chosen_reference_B` and `rejected_reference_B` of
    `Outputs`, in nats, summed over an answer's tokens. `logits` runs `model.language` and returns
    (2B, T, V); `inputs` are the arguments of `model`. The reference, in eval mode, is `copy`, or by
    default the model with its adapters off. Raises DataError without labels or for an odd number of
    rows, SpecError for a model without a reference.
    """
    labels_BT = inputs["labels"]
    if labels_BT is None or len(labels_BT) % 2:
        rows = "no labels" if labels_BT is None else f"{len(labels_BT)} rows"
        raise DataError(
            "preferences need the labels of a better and a worse answer of every sample, "
            f"got {rows}"
        )
    if copy is None:
        _check_adapters_alone_train(model)
    else:
        copy.take(model)
    chosen_B, rejected_B = (-language_modeling(logits(), labels_BT)).chunk(2)
    with eval_no_grad(model):
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
            "with its adapters off a model is its own reference only if nothing else trains, "
            f"and {others[0]} does, with {len(others) - 1} more. "
            'Fix: set trains={"language.*lora_*": 1.0}, or model.reference="frozen_copy", which '
            "holds the trainable parameters a second time"
        )
