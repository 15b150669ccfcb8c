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
    """The outputs that the loss reads; with a learned temperature also `logit_scale`, (b,): what a cosine is times."""

    image_BD: Tensor | None
    text_BD: Tensor | None


@spec
class Contrastive:
    """Each image picks its text among the batch's, and each text its image.

    Memory grows with b x B: a rank compares its own samples with all, and never all with all (2.5).
    """

    temperature: float | None = 0.07  # None: the wiring learns it, and gives its inverse as `logit_scale`
    weight: float = 1.0
    needs: ClassVar[str] = "pooled"
    whole_batch: ClassVar[bool] = True
    packs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.temperature is not None and self.temperature <= 0:
            raise SpecError(f"losses.contrastive.temperature must be above 0, got {self.temperature:g}")

    @property
    def spliced(self) -> tuple[str, ...]:
        """A learned scale among them, one a sample: else every pass would add the whole batch's gradient to it."""
        return ("image_BD", "text_BD", *(["logit_scale"] if self.temperature is None else []))

    def __call__(self, outputs: Pooled) -> Tensor:
        """(b,) float32, unweighted: the mean of both directions' cross-entropies for each of this rank's samples."""
        if outputs.image_BD is None or outputs.text_BD is None:
            raise DataError("the contrastive loss reads pooled images and texts; ask the wiring for 'pooled'")
        return info_nce(outputs.image_BD, outputs.text_BD, self._scale(outputs))

    def count(self, labels_BT: Tensor) -> Tensor:
        """(b,) float32: every sample counts one."""
        return torch.ones(len(labels_BT), device=labels_BT.device)

    def _scale(self, outputs: Pooled) -> Tensor | float:
        if self.temperature is not None:
            return 1 / self.temperature
        scale: Tensor | None = getattr(outputs, "logit_scale", None)
        if scale is None:
            raise SpecError(
                "losses.contrastive.temperature is None, and this wiring learns none; give a number, such as 0.07"
            )
        return scale


def info_nce(image_bD: Tensor, text_bD: Tensor, scale: Tensor | float) -> Tensor:
    """(b,) float32: against all B samples, image to text and text to image, as a mean. `scale` is a number or (b,)."""
    image_bD, text_bD = normalize(image_bD.float(), dim=-1), normalize(text_bD.float(), dim=-1)
    # the scale travels with the images: each rank, and each pass over a share, adds its own part of the gradient
    image_bD = image_bD * (scale.float().view(-1, 1) if isinstance(scale, Tensor) else scale)
    both_B2D, offset = gather(torch.stack([image_bD, text_bD], dim=1))
    image_BD, text_BD = both_B2D.unbind(1)
    own_b = torch.arange(offset, offset + len(image_bD), device=image_bD.device)
    to_text_b = cross_entropy(image_bD @ text_BD.T, own_b, reduction="none")
    to_image_b = cross_entropy(text_bD @ image_BD.T, own_b, reduction="none")
    return (to_text_b + to_image_b) / 2
