"""Image-text contrast over the batch of all ranks (InfoNCE in both directions; CLIP, arXiv:2103.00020, 2.3)."""

# b samples of this rank  B samples of all ranks  D width

from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bridgework.errors import DataError, SpecError
from bridgework.losses.gather import gather
from bridgework.spec import spec


class Pooled(Protocol):
    """The outputs that the loss reads."""

    image_BD: Tensor | None
    text_BD: Tensor | None


@spec
class Contrastive:
    """Each image picks its text among the batch's, and each text its image."""

    temperature: float = 0.07
    weight: float = 1.0
    needs: ClassVar[str] = "pooled"
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise SpecError(f"losses.contrastive.temperature must be above 0, got {self.temperature:g}")

    def __call__(self, outputs: Pooled) -> Tensor:
        """The unweighted sum over this rank's samples, float32."""
        if outputs.image_BD is None or outputs.text_BD is None:
            raise DataError("the contrastive loss reads pooled images and texts; ask the wiring for 'pooled'")
        return info_nce(outputs.image_BD, outputs.text_BD, self.temperature)

    def count(self, labels_BT: Tensor) -> int:
        """The samples that the sum runs over."""
        return len(labels_BT)


def info_nce(image_bD: Tensor, text_bD: Tensor, temperature: float) -> Tensor:
    """Summed over this rank's b samples: the mean of both directions' cross-entropies against all B samples."""
    image_bD, text_bD = normalize(image_bD.float(), dim=-1), normalize(text_bD.float(), dim=-1)
    both_B2D, offset = gather(torch.stack([image_bD, text_bD], dim=1))
    image_BD, text_BD = both_B2D.unbind(1)
    own_b = torch.arange(offset, offset + len(image_bD), device=image_bD.device)
    to_text = cross_entropy(image_bD @ text_BD.T / temperature, own_b, reduction="sum")
    to_image = cross_entropy(text_bD @ image_BD.T / temperature, own_b, reduction="sum")
    return (to_text + to_image) / 2
