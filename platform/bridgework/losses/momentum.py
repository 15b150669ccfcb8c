"""Image-text contrast with a momentum twin: soft targets, and a queue of what the twin saw in the steps before.

ALBEF's (Li et al. 2021, arXiv:2107.07651, 3.2), as BLIP takes it over (arXiv:2201.12086, 3.3).
"""

# b samples of this rank  B samples of all ranks  Q entries of the queue  K = B + Q keys  D width

from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bridgework.errors import DataError
from bridgework.losses.gather import gather
from bridgework.losses.matching import own
from bridgework.spec import spec


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


@spec
class MomentumContrastive:
    """Each image picks its text among the keys, and each text its image; the twin says how alike the others are.

    The keys are the twin's vectors of the batch and of the queue. (BLIP's code takes those of one worker's share of
    the batch: here they are the whole batch's, so that the loss is the same on any number of workers.)
    """

    weight: float = 1.0
    needs: ClassVar[str] = "momentum"
    whole_batch: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    spliced: ClassVar[tuple[str, ...]] = (
        "image_BD", "text_BD", "logit_scale", "image_key_BD", "text_key_BD", "identity_B",
    )  # fmt: skip
    by_image: ClassVar[bool] = True

    def __call__(self, outputs: Momentum) -> Tensor:
        """(b,) float32, unweighted: the mean of both directions for each of this rank's samples."""
        if outputs.image_BD is None or outputs.text_BD is None or outputs.image_key_BD is None:
            raise DataError("the momentum loss reads the twin's vectors; ask the wiring for 'momentum'")
        return momentum_contrast(outputs)

    def count(self, labels_BT: Tensor) -> Tensor:
        """(b,) float32: every sample counts one."""
        return torch.ones(len(labels_BT), device=labels_BT.device)


def momentum_contrast(given: Momentum) -> Tensor:
    """(b,) float32: cross-entropy with `targets`, image to text and text to image, as a mean."""
    image_bD, text_bD, scale_b1, alpha = _given(given.image_BD, given.text_BD, given.logit_scale, given.alpha)
    image_key_bD, text_key_bD, identity_b, queued_Q = _given(
        given.image_key_BD, given.text_key_BD, given.identity_B, given.identity_queue_Q
    )
    image_queue_QD, text_queue_QD = _given(given.image_queue_QD, given.text_queue_QD)
    scale_b1 = scale_b1.view(-1, 1)
    keys_B2D, offset = gather(torch.stack([image_key_bD, text_key_bD], dim=1))
    image_KD = torch.cat([keys_B2D[:, 0], image_queue_QD.to(keys_B2D)])
    text_KD = torch.cat([keys_B2D[:, 1], text_queue_QD.to(keys_B2D)])
    identity_K = torch.cat([gather(identity_b).rows_BD, queued_Q])
    own_bK = own(len(image_bD), len(image_KD), offset, identity_b, identity_K, device=image_bD.device)
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
        raise DataError("the momentum loss reads keys, queues, identities and alpha; this wiring gives only some")
    return tuple(t.float() if t.is_floating_point() else t for t in tensors if t is not None)
