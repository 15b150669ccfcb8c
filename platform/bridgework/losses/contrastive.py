"""Image-text contrast over the batch of all ranks (InfoNCE in both directions; CLIP, arXiv:2103.00020, 2.3).

Image-text contrast where an image is several vectors, of which the most similar one speaks for it.

BLIP-2's image-text contrastive learning (Li et al. 2023, arXiv:2301.12597, 3.2). Keys of all ranks carry their
gradient, which LAVIS's do not as soon as there are two ranks: its gather is detached.

Image-text contrast with a momentum twin: soft targets, and a queue of what the twin saw in the steps before.

ALBEF's (Li et al. 2021, arXiv:2107.07651, 3.2), as BLIP takes it over (arXiv:2201.12086, 3.3).
"""

from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bridgework.config import config_class
from bridgework.errors import DataError, SpecError
from bridgework.losses.gather import gather
from bridgework.losses.matching import positive_mask

# b samples of this rank  B samples of all ranks  D width


class Pooled(Protocol):
    """The outputs that the loss reads; with a learned temperature also `logit_scale`, (b,): what a cosine is times."""

    image_BD: Tensor | None
    text_BD: Tensor | None


@config_class
class Contrastive:
    """Each image picks its text among the batch's, and each text its image.

    Memory grows with b x B: a rank compares its own samples with all, and never all with all (2.5).
    """

    temperature: float | None = (
        0.07  # None: the wiring learns it, and gives its inverse as `logit_scale`
    )
    weight: float = 1.0
    requires: ClassVar[str] = "pooled"
    whole_batch: ClassVar[bool] = True
    supports_packing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.temperature is not None and self.temperature <= 0:
            raise SpecError(
                f"losses.contrastive.temperature must be above 0, got {self.temperature:g}"
            )

    @property
    def cached_outputs(self) -> tuple[str, ...]:
        """A learned scale among them, one a sample: else every pass would add the whole batch's gradient to it."""
        return ("image_BD", "text_BD", *(["logit_scale"] if self.temperature is None else []))

    def __call__(self, outputs: Pooled) -> Tensor:
        """(b,) float32, unweighted: the mean of both directions' cross-entropies for each of this rank's samples."""
        if outputs.image_BD is None or outputs.text_BD is None:
            raise DataError(
                "the contrastive loss reads pooled images and texts; ask the wiring for 'pooled'"
            )
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


# b samples of this rank  B samples of all ranks  Q queries  D width


class Queried(Protocol):
    """The outputs that the loss reads."""

    @property
    def image_BQD(self) -> Tensor | None: ...
    @property
    def text_BD(self) -> Tensor | None: ...
    @property
    def logit_scale(
        self,
    ) -> Tensor | None: ...  # (b,) what a cosine is times: learned, one number for all
    @property
    def identity_B(
        self,
    ) -> Tensor | None: ...  # int64: rows of one identity show one image; below 0 it is not known


@config_class
class QueryContrast:
    """Each image picks its text among the batch's, and each text its image, by the largest similarity of a query.

    Where rows are known to show one image, all texts of that image are right, with equal shares (LAVIS, of its
    fine-tune for retrieval).
    """

    label_smoothing: float = 0.1  # LAVIS, blip2_qformer.py
    weight: float = 1.0
    requires: ClassVar[str] = "pooled"
    whole_batch: ClassVar[bool] = True
    supports_packing: ClassVar[bool] = False
    cached_outputs: ClassVar[tuple[str, ...]] = ("image_BQD", "text_BD", "logit_scale")
    by_image: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise SpecError(
                f"losses.querycontrast.label_smoothing lies in [0, 1), got {self.label_smoothing:g}"
            )

    def __call__(self, outputs: Queried) -> Tensor:
        """(B,) float32: the unweighted loss of each sample of this rank."""
        if outputs.image_BQD is None or outputs.text_BD is None or outputs.logit_scale is None:
            raise DataError(
                "the loss reads image queries, texts and their scale; ask the wiring for 'pooled'"
            )
        image_bQD, text_bD = (
            normalize(outputs.image_BQD.float(), dim=-1),
            normalize(outputs.text_BD.float(), dim=-1),
        )
        # the scale travels with the images: each rank, and each pass over a share, adds its own part of the gradient
        image_bQD = image_bQD * outputs.logit_scale.float().view(-1, 1, 1)
        (image_BQD, offset), (text_BD, _) = gather(image_bQD), gather(text_bD)
        to_text_bB = torch.einsum("bqd,kd->bkq", image_bQD, text_BD).amax(-1)
        to_image_bB = torch.einsum("bd,kqd->bkq", text_bD, image_BQD).amax(-1)
        identity_b = outputs.identity_B
        identity_B = None if identity_b is None else gather(identity_b).rows_BD
        own_bB = positive_mask(
            len(text_bD), len(text_BD), offset, identity_b, identity_B, device=text_bD.device
        ).float()
        right_bB = own_bB / own_bB.sum(1, keepdim=True)
        to_text_b, to_image_b = (
            cross_entropy(
                similar_bB, right_bB, reduction="none", label_smoothing=self.label_smoothing
            )
            for similar_bB in (to_text_bB, to_image_bB)
        )
        return (to_text_b + to_image_b) / 2

    def count(self, labels_BT: Tensor) -> Tensor:
        """(B,) float32: one a sample."""
        return torch.ones(len(labels_BT), device=labels_BT.device)


# b samples of this rank  B samples of all ranks  Q entries of the queue  K = B + Q keys  D width


class Momentum(Protocol):
    """The outputs that the loss reads: vectors of unit length, of the model and (keys) of its twin."""

    image_BD: Tensor | None
    text_BD: Tensor | None
    logit_scale: Tensor | None  # (b,): one over the temperature
    image_key_BD: Tensor | None
    text_key_BD: Tensor | None
    identity_B: Tensor | None  # int64: rows of one identity show one image; below 0 it is not known
    image_queue_QD: Tensor | None
    text_queue_QD: Tensor | None
    identity_queue_Q: Tensor | None
    alpha: Tensor | None  # share of the twin's opinion in the targets


@config_class
class MomentumContrastive:
    """Each image picks its text among the keys, and each text its image; the twin says how alike the others are.

    The keys are the twin's vectors of the batch and of the queue. (BLIP's code takes those of one worker's share of
    the batch: here they are the whole batch's, so that the loss is the same on any number of workers.)
    """

    weight: float = 1.0
    requires: ClassVar[str] = "momentum"
    whole_batch: ClassVar[bool] = True
    supports_packing: ClassVar[bool] = False
    cached_outputs: ClassVar[tuple[str, ...]] = (
        "image_BD", "text_BD", "logit_scale", "image_key_BD", "text_key_BD", "identity_B",
    )  # fmt: skip
    by_image: ClassVar[bool] = True

    def __call__(self, outputs: Momentum) -> Tensor:
        """(b,) float32, unweighted: the mean of both directions for each of this rank's samples."""
        if outputs.image_BD is None or outputs.text_BD is None or outputs.image_key_BD is None:
            raise DataError(
                "the momentum loss reads the twin's vectors; ask the wiring for 'momentum'"
            )
        return momentum_contrast(outputs)

    def count(self, labels_BT: Tensor) -> Tensor:
        """(b,) float32: every sample counts one."""
        return torch.ones(len(labels_BT), device=labels_BT.device)


def momentum_contrast(given: Momentum) -> Tensor:
    """(b,) float32: cross-entropy with `targets`, image to text and text to image, as a mean."""
    image_bD, text_bD, scale_b1, alpha = _given(
        given.image_BD, given.text_BD, given.logit_scale, given.alpha
    )
    image_key_bD, text_key_bD, identity_b, queued_Q = _given(
        given.image_key_BD, given.text_key_BD, given.identity_B, given.identity_queue_Q
    )
    image_queue_QD, text_queue_QD = _given(given.image_queue_QD, given.text_queue_QD)
    scale_b1 = scale_b1.view(-1, 1)
    keys_B2D, offset = gather(torch.stack([image_key_bD, text_key_bD], dim=1))
    image_KD = torch.cat([keys_B2D[:, 0], image_queue_QD.to(keys_B2D)])
    text_KD = torch.cat([keys_B2D[:, 1], text_queue_QD.to(keys_B2D)])
    identity_K = torch.cat([gather(identity_b).rows_BD, queued_Q])
    own_bK = positive_mask(
        len(image_bD), len(image_KD), offset, identity_b, identity_K, device=image_bD.device
    )
    to_text_bK = targets(image_key_bD @ text_KD.T * scale_b1, own_bK, alpha)
    to_image_bK = targets(text_key_bD @ image_KD.T * scale_b1, own_bK, alpha)
    to_text_b = cross_entropy(image_bD @ text_KD.T * scale_b1, to_text_bK, reduction="none")
    to_image_b = cross_entropy(text_bD @ image_KD.T * scale_b1, to_image_bK, reduction="none")
    return (to_text_b + to_image_b) / 2


@torch.no_grad()
def targets(twin_bK: Tensor, own_bK: Tensor, alpha: Tensor | float) -> Tensor:
    """(b, K), rows that sum to one: alpha of what the twin thinks, the rest shared by a row's own candidates."""
    hard_bK = own_bK.float() / own_bK.sum(1, keepdim=True)
    return alpha * twin_bK.float().softmax(1) + (1 - alpha) * hard_bK


def _given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """In float32 where they are floating. Raises DataError for what the wiring left out."""
    if any(tensor is None for tensor in tensors):
        raise DataError(
            "the momentum loss reads keys, queues, identities and alpha; this wiring gives only some"
        )
    return tuple(t.float() if t.is_floating_point() else t for t in tensors if t is not None)
