"""Low-rank adapters on a language model, through peft (Hu et al. 2021, arXiv:2106.09685).

An adapted matrix is W + (alpha / rank) B A, with B = 0 at the start. Its parameters are named
`...base_layer.weight`, `...lora_A...` and `...lora_B...`: `trains={"language.*lora_*": 1.0}` trains
all adapters.
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
    """Adapters on every linear layer but the output, or on `targets`; defaults: LLaVA 1.5."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    targets: tuple[str, ...] = ()  # last parts of layer names, e.g. q_proj; default () takes all

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError(f"language.lora.rank must be at least 1, got {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(f"language.lora.dropout must be in [0, 1), got {self.dropout:g}")

    def add(self, language: nn.Module) -> nn.Module:
        """Return the model with adapters, in place. Raises SpecError for an unknown target."""
        # imports take seconds, so only when a model is built
        from peft import LoraConfig, inject_adapter_in_model

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
    """Return whether a parameter of this name belongs to an adapter."""
    return ".lora_" in parameter


def adapter_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Return (name, layer) of every layer with adapters."""
    return [(name, layer) for name, layer in module.named_modules() if hasattr(layer, "lora_A")]


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """Run the block with all adapters off: then the model is its own DPO reference.

    Sets their scale to 0, because peft's own switch also freezes and unfreezes parameters. Raises
    SpecError for a model without adapters.
    """
    layers = [layer for _, layer in adapter_layers(module)]
    if not layers:
        raise SpecError(
            "model.reference: the DPO reference is the model with its adapters off, "
            "and this model has none. "
            'Fix: give the stage\'s model a language.lora, or set model.reference="frozen_copy"'
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
    """Add every adapter to its matrix and remove it, in place, with its names."""
    for name, layer in adapter_layers(module):
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, layer.get_base_layer())


def merge_adapters(config: Any, model: nn.Module) -> Any:
    """Merge the adapters of a wiring, in place; return its config without adapters."""
    if not adapter_layers(model):
        return config
    merge(model)
    return replace(config, language=replace(config.language, lora=None))


def remap_adapters(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` of a model without adapters under the names of `model`."""
    names = {name.replace(BASE, "."): name for name in model.state_dict() if BASE in name}
    return {names.get(name, name): tensor for name, tensor in state.items()}
