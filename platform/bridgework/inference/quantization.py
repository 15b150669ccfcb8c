"""Language-model weights in 8 bits, with one scale for each output of a linear layer.

Activations keep their precision. It saves memory: about three quarters of float32, half of bf16.
It does not make a step faster, because the weights are converted again in every forward pass.
"""

# O outputs  I inputs

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bridgework.errors import SpecError


class Int8Linear(nn.Module):
    """A linear layer without gradients, whose weights are int8 times a scale per output."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight_OI = layer.weight.detach().float()
        scale_O = weight_OI.abs().amax(1).clamp(min=1e-12) / 127
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", (weight_OI / scale_O[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs in the dtype of `inputs`."""
        outputs = linear(inputs, self.weight.to(inputs.dtype)) * self.scale.to(inputs.dtype)
        return outputs if self.bias is None else outputs + self.bias.to(inputs.dtype)


def quantize(model: Any) -> tuple[int, int]:
    """Replace the linear layers of a model's language model, but not its output matrix.

    Returns:
        The bytes of the language model before and after.

    Raises:
        SpecError: the model has no language model, or that has no linear layers.
    """
    language = getattr(model, "language", None)
    if language is None:
        raise SpecError(
            f"int8: a {type(model).__name__} has no language model of its own. Fix: leave out int8"
        )
    before, head = _bytes(language), language.get_output_embeddings()
    layers = [
        (parent, name, child)
        for parent in language.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not head
    ]
    if not layers:
        arch = language.config.model_type
        raise SpecError(f"int8: {arch!r} has no linear layers of torch. Fix: leave out int8")
    for parent, name, child in layers:
        setattr(parent, name, Int8Linear(child))
    return before, _bytes(language)


def _bytes(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
