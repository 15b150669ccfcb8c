"""Low-rank adapters on a language model, through peft (Hu et al. 2021, arXiv:2106.09685).

An adapted matrix W is W + (alpha / rank) B A, with B = 0 at first. `W` is called `...base_layer.weight` from then on
and the adapters `...lora_A...` and `...lora_B...`: `trains={"language.*lora_*": 1.0}` names them all.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bridgework.config import config_class
from bridgework.errors import SpecError

OFF = 0.0
BASE = ".base_layer."


@config_class
class LoRAConfig:
    """Adapters on every linear layer but the output's, or on those named; the defaults are LLaVA 1.5's."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    targets: tuple[str, ...] = ()  # last parts of the names of layers, such as q_proj; () takes all

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError(f"language.lora.rank must be at least 1, got {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(f"language.lora.dropout lies in [0, 1), got {self.dropout:g}")

    def add(self, language: nn.Module) -> nn.Module:
        """The same model with adapters in it. Raises SpecError for a target that it does not have."""
        from peft import (
            LoraConfig,
            inject_adapter_in_model,
        )  # takes seconds: not before a model is built

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets) or "all-linear",
        )
        try:
            return inject_adapter_in_model(config, language)
        except ValueError as error:
            raise SpecError(
                f"language.lora.targets {self.targets}: {str(error).splitlines()[0]}"
            ) from None

    def tiny(self) -> "LoRAConfig":
        return replace(self, rank=min(self.rank, 4), dropout=0.0)


def is_adapter(parameter: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in parameter


def adapter_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of every layer with adapters."""
    return [(name, layer) for name, layer in module.named_modules() if hasattr(layer, "lora_A")]


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters: the reference of preference learning. Raises SpecError without any.

    By their scale: peft's own switch also freezes and thaws, which is the stage's to say.
    """
    layers = [layer for _, layer in adapter_layers(module)]
    if not layers:
        raise SpecError(
            "the reference of preference learning is the model with its adapters off, and this one has none; "
            'give the stage\'s model a language.lora, or set model.reference="frozen_copy"'
        )
    scales = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling = dict.fromkeys(layer.scaling, OFF)
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling = scale


def merge(module: nn.Module) -> None:
    """Add every adapter to its matrix and take it away, in place: names are those of a model without adapters."""
    for name, layer in adapter_layers(module):
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, layer.get_base_layer())


def merge_adapters(spec: Any, model: nn.Module) -> Any:
    """Merge the adapters of a wiring, in place, and give the spec of what it is then."""
    if not adapter_layers(model):
        return spec
    merge(model)
    return replace(spec, language=replace(spec.language, lora=None))


def remap_adapters(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` of a model without adapters under the names of `model`, where that has some."""
    names = {name.replace(BASE, "."): name for name in model.state_dict() if BASE in name}
    return {names.get(name, name): tensor for name, tensor in state.items()}
