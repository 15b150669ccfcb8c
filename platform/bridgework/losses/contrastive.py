"""Image-text contrastive losses over the batch of all ranks: InfoNCE in both directions.

`Contrastive`          one vector per image (CLIP; Radford et al. 2021, arXiv:2103.00020, 2.3)
`QueryContrast`        several vectors per image; the most similar one counts (BLIP-2; Li et al.
                       2023, arXiv:2301.12597, 3.2). Keys of all ranks carry their gradient, while
                       LAVIS detaches them as soon as there are two ranks.
`MomentumContrastive`  soft targets and a queue of keys from a momentum encoder (ALBEF; Li et al.
                       2021, arXiv:2107.07651, 3.2; in BLIP, arXiv:2201.12086, 3.3)
"""

# b samples of this rank  B samples of all ranks  D width
# Q queries of an image, or entries of the queue  K = B + Q keys

from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bridgework.config import config_class
from bridgework.errors import SpecError
from bridgework.losses.base import Loss, check_label_smoothing, given
from bridgework.losses.gather import gather
from bridgework.losses.matching import positive_mask


class Pooled(Protocol):
    """Outputs that the loss reads; optional `logit_scale` (b,) is a learned 1 / temperature."""

    image_BD: Tensor | None
    text_BD: Tensor | None


@config_class
class Contrastive(Loss):
    """Each image picks its text among the batch's, and each text its image.

    Memory grows with b x B, because a rank compares only its own samples with all (2.5).
    """

    # None: the wiring learns it, and returns its inverse as `logit_scale`
    temperature: float | None = 0.07
    weight: float = 1.0
    requires: ClassVar[str] = "pooled"
    whole_batch: ClassVar[bool] = True
    supports_packing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.temperature is not None and self.temperature <= 0:
            raise SpecError(
                f"losses.contrastive.temperature must be above 0, got {self.temperature:g}"
            )

    @property
    def cached_outputs(self) -> tuple[str, ...]:
        """Pooled images and texts, and a learned scale.

        The scale is cached per sample: otherwise each pass adds the gradient of the complete batch.
        """
        return ("image_BD", "text_BD", *(["logit_scale"] if self.temperature is None else []))

    def __call__(self, outputs: Pooled) -> Tensor:
        """Return (b,) float32: for each sample of this rank the mean of both directions."""
        image_bD, text_bD = given("contrastive", self.requires, outputs.image_BD, outputs.text_BD)
        return info_nce(image_bD, text_bD, self._scale(outputs))

    def _scale(self, outputs: Pooled) -> Tensor | float:
        if self.temperature is not None:
            return 1 / self.temperature
        scale: Tensor | None = getattr(outputs, "logit_scale", None)
        if scale is None:
            raise SpecError(
                "losses.contrastive.temperature: this wiring learns none. "
                "Got None; expected a number above 0. Fix: set e.g. 0.07"
            )
        return scale


def info_nce(image_bD: Tensor, text_bD: Tensor, scale: Tensor | float) -> Tensor:
    """Return (b,) float32: InfoNCE against all B samples, the mean of both directions.

    `scale` is 1 / temperature, a number or (b,).
    """
    image_bD, text_bD = normalize(image_bD.float(), dim=-1), normalize(text_bD.float(), dim=-1)
    # scale the images before the gather, so that each rank and each pass adds its own gradient
    image_bD = image_bD * (scale.float().view(-1, 1) if isinstance(scale, Tensor) else scale)
    both_B2D, offset = gather(torch.stack([image_bD, text_bD], dim=1))
    image_BD, text_BD = both_B2D.unbind(1)
    own_b = torch.arange(offset, offset + len(image_bD), device=image_bD.device)
    to_text_b = cross_entropy(image_bD @ text_BD.T, own_b, reduction="none")
    to_image_b = cross_entropy(text_bD @ image_BD.T, own_b, reduction="none")
    return (to_text_b + to_image_b) / 2


class Queried(Protocol):
    """Outputs that the loss reads."""

    image_BQD: Tensor | None
    text_BD: Tensor | None
    logit_scale: Tensor | None  # (b,) learned 1 / temperature, one number for all
    identity_B: Tensor | None  # int64: rows of one identity show one image; below 0: unknown


@config_class
class QueryContrast(Loss):
    """`Contrastive` with several vectors per image, of which the most similar one counts.

    Where rows are known to show one image, all texts of that image are positives with equal shares
    (LAVIS, in its retrieval fine-tune).
    """

    label_smoothing: float = 0.1  # LAVIS, blip2_qformer.py
    weight: float = 1.0
    requires: ClassVar[str] = "pooled"
    whole_batch: ClassVar[bool] = True
    cached_outputs: ClassVar[tuple[str, ...]] = ("image_BQD", "text_BD", "logit_scale")
    by_image: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_label_smoothing("querycontrast", self.label_smoothing)

    def __call__(self, outputs: Queried) -> Tensor:
        """Return (b,) float32: the unweighted loss of each sample of this rank."""
        image_bQD, text_bD, scale_b = given(
            "querycontrast",
            self.requires,
            outputs.image_BQD,
            outputs.text_BD,
            outputs.logit_scale,
        )
        image_bQD = normalize(image_bQD.float(), dim=-1)
        text_bD = normalize(text_bD.float(), dim=-1)
        # scale the images before the gather, so that each rank and each pass adds its own gradient
        image_bQD = image_bQD * scale_b.float().view(-1, 1, 1)
        (image_BQD, offset), (text_BD, _) = gather(image_bQD), gather(text_bD)
        to_text_bB = torch.einsum("bqd,kd->bkq", image_bQD, text_BD).amax(-1)
        to_image_bB = torch.einsum("bd,kqd->bkq", text_bD, image_BQD).amax(-1)
        identity_b = outputs.identity_B
        identity_B = None if identity_b is None else gather(identity_b).rows_BD
        positive_bB = positive_mask(
            len(text_bD), len(text_BD), offset, identity_b, identity_B, device=text_bD.device
        ).float()
        targets_bB = positive_bB / positive_bB.sum(1, keepdim=True)
        to_text_b, to_image_b = (
            cross_entropy(
                similarity_bB, targets_bB, reduction="none", label_smoothing=self.label_smoothing
            )
            for similarity_bB in (to_text_bB, to_image_bB)
        )
        return (to_text_b + to_image_b) / 2


class Momentum(Protocol):
    """Outputs that the loss reads: unit vectors of the model, and keys of the momentum encoder."""

    image_BD: Tensor | None
    text_BD: Tensor | None
    logit_scale: Tensor | None  # (b,): 1 / temperature
    image_key_BD: Tensor | None
    text_key_BD: Tensor | None
    identity_B: Tensor | None  # int64: rows of one identity show one image; below 0: unknown
    image_queue_QD: Tensor | None
    text_queue_QD: Tensor | None
    identity_queue_Q: Tensor | None
    alpha: Tensor | None  # share of the momentum encoder in the targets


@config_class
class MomentumContrastive(Loss):
    """Each image picks its text among the keys, and each text its image, under soft targets.

    The keys are the momentum encoder's vectors of the batch and of the queue. (BLIP's code takes
    those of one worker's share of the batch. Here they are the complete batch's, so that the loss
    is the same on any number of workers.)
    """

    weight: float = 1.0
    requires: ClassVar[str] = "momentum"
    whole_batch: ClassVar[bool] = True
    cached_outputs: ClassVar[tuple[str, ...]] = (
        "image_BD", "text_BD", "logit_scale", "image_key_BD", "text_key_BD", "identity_B",
    )  # fmt: skip
    by_image: ClassVar[bool] = True

    def __call__(self, outputs: Momentum) -> Tensor:
        """Return (b,) float32: for each sample of this rank the mean of both directions."""
        return momentum_contrast(outputs, self.requires)


def momentum_contrast(outputs: Momentum, requires: str = "momentum") -> Tensor:
    """Return (b,) float32: cross-entropy with `soft_targets`, the mean of both directions."""
    vectors = given(
        "momentumcontrastive",
        requires,
        outputs.image_BD,
        outputs.text_BD,
        outputs.logit_scale,
        outputs.alpha,
        outputs.image_key_BD,
        outputs.text_key_BD,
        outputs.image_queue_QD,
        outputs.text_queue_QD,
    )
    image_bD, text_bD, scale_b, alpha, *keys_and_queues = (t.float() for t in vectors)
    image_key_bD, text_key_bD, image_queue_QD, text_queue_QD = keys_and_queues
    identity_b, identity_queue_Q = given(
        "momentumcontrastive", requires, outputs.identity_B, outputs.identity_queue_Q
    )
    scale_b1 = scale_b.view(-1, 1)
    keys_B2D, offset = gather(torch.stack([image_key_bD, text_key_bD], dim=1))
    image_KD = torch.cat([keys_B2D[:, 0], image_queue_QD.to(keys_B2D)])
    text_KD = torch.cat([keys_B2D[:, 1], text_queue_QD.to(keys_B2D)])
    identity_K = torch.cat([gather(identity_b).rows_BD, identity_queue_Q])
    positive_bK = positive_mask(
        len(image_bD), len(image_KD), offset, identity_b, identity_K, device=image_bD.device
    )
    text_targets_bK = soft_targets(image_key_bD @ text_KD.T * scale_b1, positive_bK, alpha)
    image_targets_bK = soft_targets(text_key_bD @ image_KD.T * scale_b1, positive_bK, alpha)
    to_text_b = cross_entropy(image_bD @ text_KD.T * scale_b1, text_targets_bK, reduction="none")
    to_image_b = cross_entropy(text_bD @ image_KD.T * scale_b1, image_targets_bK, reduction="none")
    return (to_text_b + to_image_b) / 2


@torch.no_grad()
def soft_targets(momentum_logits_bK: Tensor, positive_bK: Tensor, alpha: Tensor | float) -> Tensor:
    """Return (b, K), rows that sum to 1.

    A share of alpha is the softmax of the momentum encoder's logits; the positives of the row share
    the rest equally.
    """
    hard_bK = positive_bK.float() / positive_bK.sum(1, keepdim=True)
    return alpha * momentum_logits_bK.float().softmax(1) + (1 - alpha) * hard_bK
