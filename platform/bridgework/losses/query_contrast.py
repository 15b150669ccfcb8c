"""Image-text contrast where an image is several vectors, of which the most similar one speaks for it.

BLIP-2's image-text contrastive learning (Li et al. 2023, arXiv:2301.12597, 3.2). Keys of all ranks carry their
gradient, which LAVIS's do not as soon as there are two ranks: its gather is detached.
"""

# b samples of this rank  B samples of all ranks  Q queries  D width

from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bridgework.errors import DataError, SpecError
from bridgework.losses.gather import gather
from bridgework.losses.matching import own
from bridgework.spec import spec


class Queried(Protocol):
    """The outputs that the loss reads."""

    @property
    def image_BQD(self) -> Tensor | None: ...
    @property
    def text_BD(self) -> Tensor | None: ...
    @property
    def logit_scale(self) -> Tensor | None: ...  # (b,) what a cosine is times: learned, one number for all
    @property
    def identity_B(self) -> Tensor | None: ...  # int64: rows of one identity show one image; below 0 it is not known


@spec
class QueryContrast:
    """Each image picks its text among the batch's, and each text its image, by the largest similarity of a query.

    Where rows are known to show one image, all texts of that image are right, with equal shares (LAVIS, of its
    fine-tune for retrieval).
    """

    label_smoothing: float = 0.1  # LAVIS, blip2_qformer.py
    weight: float = 1.0
    needs: ClassVar[str] = "pooled"
    whole_batch: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    spliced: ClassVar[tuple[str, ...]] = ("image_BQD", "text_BD", "logit_scale")
    by_image: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise SpecError(f"losses.querycontrast.label_smoothing lies in [0, 1), got {self.label_smoothing:g}")

    def __call__(self, outputs: Queried) -> Tensor:
        """(B,) float32: the unweighted loss of each sample of this rank."""
        if outputs.image_BQD is None or outputs.text_BD is None or outputs.logit_scale is None:
            raise DataError("the loss reads image queries, texts and their scale; ask the wiring for 'pooled'")
        image_bQD, text_bD = normalize(outputs.image_BQD.float(), dim=-1), normalize(outputs.text_BD.float(), dim=-1)
        # the scale travels with the images: each rank, and each pass over a share, adds its own part of the gradient
        image_bQD = image_bQD * outputs.logit_scale.float().view(-1, 1, 1)
        (image_BQD, offset), (text_BD, _) = gather(image_bQD), gather(text_bD)
        to_text_bB = torch.einsum("bqd,kd->bkq", image_bQD, text_BD).amax(-1)
        to_image_bB = torch.einsum("bd,kqd->bkq", text_bD, image_BQD).amax(-1)
        identity_b = outputs.identity_B
        identity_B = None if identity_b is None else gather(identity_b).rows_BD
        own_bB = own(len(text_bD), len(text_BD), offset, identity_b, identity_B, device=text_bD.device).float()
        right_bB = own_bB / own_bB.sum(1, keepdim=True)
        to_text_b, to_image_b = (
            cross_entropy(similar_bB, right_bB, reduction="none", label_smoothing=self.label_smoothing)
            for similar_bB in (to_text_bB, to_image_bB)
        )
        return (to_text_b + to_image_b) / 2

    def count(self, labels_BT: Tensor) -> Tensor:
        """(B,) float32: one a sample."""
        return torch.ones(len(labels_BT), device=labels_BT.device)
