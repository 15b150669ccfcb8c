"""Image-text matching with hard negatives: classify whether an image and a text belong together.

From ALBEF and BLIP (Li et al. 2022, arXiv:2201.12086, 3.3). Each sample gives three pairs: its own,
its text with a negative image, its image with a negative text. A wiring runs its matching head on
the pairs of `matching_pairs` and returns `group_by_sample` of the logits as `match_B3C`.
"""

# b samples of this rank  K candidates: this rank's samples, or all ranks'  T tokens  P patches
# F their width  Q vectors of an image  D width  M = 3b pairs  B samples  C classes

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from bridgework import rng
from bridgework.config import added, config_class
from bridgework.errors import DataError, SpecError
from bridgework.losses.base import Loss, given
from bridgework.losses.gather import gather

_ODD = tuple(odd - 2**64 for odd in rng.ODD)  # as signed int64
FLOOR = 1e-4  # of BLIP's pretraining (blip_pretrain.py); its retrieval and BLIP-2 have none


class Matched(Protocol):
    """Outputs that the loss reads."""

    match_B3C: Tensor | None


@config_class
class Matching(Loss):
    """Cross-entropy of match (class 1) or no match (class 0) over a sample's three pairs.

    A negative is drawn with a probability that grows with its similarity, see `hard_negatives`.
    Candidates are the samples of this rank, of one lane, or of all ranks. A lane is a fixed slice
    of the batch: the share of one worker of a release, on any number of workers. Except for `rank`,
    the draws are the same for any number of workers.
    """

    negatives: Literal["rank", "lane", "all"] = "rank"
    weight: float = 1.0
    # added to every candidate's probability, so that an easy one may be drawn too
    floor: float = added(default=FLOOR)
    # no `cached_outputs`: a negative needs its image tokens with their gradient
    whole_batch: ClassVar[bool] = True
    by_image: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise SpecError(f"losses.matching.floor is a probability in [0, 1), got {self.floor:g}")

    @property
    def requires(self) -> str:
        """`match` for negatives of this rank, else `match_lane` or `match_all`."""
        return "match" if self.negatives == "rank" else f"match_{self.negatives}"

    @property
    def options(self) -> Mapping[str, float]:
        """Arguments of the wiring's forward, which draws the negatives."""
        return {"floor": self.floor}

    def __call__(self, outputs: Matched) -> Tensor:
        """Return (B,) float32: the unweighted sum over the three pairs of each sample."""
        (match_B3C,) = given("matching", self.requires, outputs.match_B3C)
        return matching(match_B3C)

    def count(self, labels_BT: Tensor) -> Tensor:
        """Return (B,) float32: 3 pairs for each sample."""
        return torch.full((len(labels_BT),), 3.0, device=labels_BT.device)


def matching(match_B3C: Tensor) -> Tensor:
    """Return (B,) summed cross-entropy; of the three pairs, the first is a match."""
    truth_B3 = torch.tensor([1, 0, 0], device=match_B3C.device).expand(len(match_B3C), 3)
    nats_B3 = cross_entropy(
        match_B3C.float().flatten(0, 1), truth_B3.flatten(), reduction="none"
    ).view(-1, 3)
    return nats_B3.sum(1)


class Pairs(NamedTuple):
    """Inputs of the matching head: own pairs, own texts + negative images, negative texts."""

    ids_MT: Tensor
    attention_MT: Tensor  # bool
    images_MPF: Tensor


def matching_pairs(
    ids_bT: Tensor,
    attention_bT: Tensor,
    images_bPF: Tensor,
    *,
    image_bQD: Tensor,
    text_bD: Tensor,
    scale: Tensor | float,
    identity_b: Tensor | None = None,
    lane_b: Tensor | None = None,
    everywhere: bool = False,
    floor: float = FLOOR,
) -> Pairs:
    """Return the pairs to classify, with hard negatives of this rank, of the same lane or of all.

    image_bQD and text_bD are of unit length; of several vectors the nearest counts. `scale` is
    1 / temperature. Rows of one identity (0 or more) show one image and are not negatives of each
    other. `lane_b` (int64) restricts negatives to the same lane, all of which are on this rank;
    `everywhere` draws from all ranks. The gradient of an image's tokens comes from all ranks.
    Raises DataError for a sample without a negative.
    """
    offset, images_KPF = 0, images_bPF
    ids_KT, attention_KT, identity_K = ids_bT, attention_bT, identity_b
    image_KQD, text_KD = image_bQD, text_bD
    seed = torch.tensor([rng.step_seed() % 2**31], device=ids_bT.device)
    if everywhere or lane_b is not None:
        seed = gather(seed).rows_BD[:1]
    if everywhere:
        ids_KT, attention_KT = gather_texts(ids_bT, attention_bT)
        images_KPF, offset = gather(images_bPF)
        image_KQD, text_KD = gather(image_bQD.detach()).rows_BD, gather(text_bD.detach()).rows_BD
        identity_K = None if identity_b is None else gather(identity_b).rows_BD
    excluded_bK = positive_mask(
        len(ids_bT), len(ids_KT), offset, identity_b, identity_K, device=ids_bT.device
    )
    keys_b, keys_K = _keys(ids_bT * attention_bT), _keys(ids_KT * attention_KT)
    to_image_bK = nearest(text_bD, image_KQD) * scale
    to_text_bK = nearest(text_KD, image_bQD).T * scale
    if lane_b is not None:
        other_lane_bK = lane_b[:, None] != lane_b
        excluded_bK = excluded_bK | other_lane_bK
        to_image_bK, to_text_bK = (
            to_bK.masked_fill(other_lane_bK, -torch.inf) for to_bK in (to_image_bK, to_text_bK)
        )
    image_b = hard_negatives(to_image_bK, excluded_bK, hash_uniform(keys_b, keys_K, seed), floor)
    text_b = hard_negatives(to_text_bK, excluded_bK, hash_uniform(keys_b, keys_K, seed + 1), floor)
    padding = (0, ids_KT.shape[1] - ids_bT.shape[1])
    own_ids_bT, own_attention_bT = pad(ids_bT, padding), pad(attention_bT, padding)
    return Pairs(
        torch.cat([own_ids_bT, own_ids_bT, ids_KT[text_b]]),
        torch.cat([own_attention_bT, own_attention_bT, attention_KT[text_b]]),
        torch.cat([images_bPF, images_KPF[image_b], images_bPF]),
    )


def group_by_sample(logits_MC: Tensor) -> Tensor:
    """Return (b, 3, C): the logits of each sample's pairs, from the order of `matching_pairs`."""
    return logits_MC.view(3, -1, logits_MC.shape[-1]).transpose(0, 1)


@torch.no_grad()
def nearest(text_XD: Tensor, image_YQD: Tensor) -> Tensor:
    """Return (X, Y) float32 cosines of each text with the nearest of an image's unit vectors."""
    cosine_XYQ: Tensor = torch.einsum("xd,yqd->xyq", text_XD.float(), image_YQD.float())
    return cosine_XYQ.amax(-1)


@torch.no_grad()
def hard_negatives(
    similarity_bK: Tensor, excluded_bK: Tensor, uniform_bK: Tensor, floor: float = FLOOR
) -> Tensor:
    """Draw a candidate for every row, with a probability that grows with similarity: (b,) int64.

    similarity_bK is divided by the temperature. excluded_bK (bool) is true for candidates that
    belong to the row. uniform_bK (float64, in (0, 1)) decides the draw. With a floor, probabilities
    are the softmax over all candidates plus the floor, and the excluded ones are dropped afterwards
    (BLIP, blip_pretrain.py). Without, they are the softmax over the other candidates (LAVIS,
    blip2_qformer.py). Raises DataError for a row whose candidates are all excluded.
    """
    if bool(excluded_bK.all(1).any()):
        raise DataError(
            f"losses.matching: a sample has no negative among {excluded_bK.shape[1]} candidates. "
            "Expected 2 samples of different images on every rank, or in every lane where "
            "negatives are of a lane. Fix: raise budget.batch or budget.micro, or set "
            "losses.matching.negatives=all"
        )
    nats_bK = similarity_bK.double()
    if floor:
        nats_bK = (similarity_bK.float().softmax(1).double() + floor).log()
    # Gumbel-max: the argmax of log-probabilities with this noise is one draw from them
    gumbel_bK = -(-uniform_bK.log()).log()
    return (nats_bK.masked_fill(excluded_bK, -torch.inf) + gumbel_bK).argmax(1)


def hash_uniform(rows_b: Tensor, columns_K: Tensor, seed: Tensor) -> Tensor:
    """Return (b, K) float64 in (0, 1), a hash of row key and column key: the same on every rank."""
    return rng.unit(rng.mix(rows_b[:, None] * _ODD[0] + columns_K * _ODD[1] + seed))


def _keys(ids_bT: Tensor) -> Tensor:
    """Return (b,) int64 hashes of the texts, which do not depend on padding (0)."""
    places_T = torch.arange(1, ids_bT.shape[1] + 1, device=ids_bT.device) * _ODD[2]
    return ((ids_bT + 1) * (ids_bT != 0) * places_T).sum(1)


def positive_mask(
    rows: int,
    columns: int,
    offset: int = 0,
    identity_b: Tensor | None = None,
    identity_K: Tensor | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Return (b, K) bool, true for the candidates that belong to row i.

    These are candidate `offset` + i and those of its identity. An identity below 0 is unknown.
    """
    own_b = torch.arange(offset, offset + rows, device=device)
    own_bK = own_b[:, None] == torch.arange(columns, device=device)
    if identity_b is None or identity_K is None:
        return own_bK
    return own_bK | ((identity_b[:, None] == identity_K) & (identity_b[:, None] >= 0))


def gather_texts(ids_bT: Tensor, attention_bT: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ids, attention) of all ranks in order, padded on the right to the widest rank's T."""
    width = torch.tensor(ids_bT.shape[1], device=ids_bT.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(width, dist.ReduceOp.MAX)
    both_b2T = torch.stack([ids_bT, attention_bT.to(ids_bT.dtype)], dim=1)
    padded_b2T = pad(both_b2T, (0, int(width) - ids_bT.shape[1]))
    ids_BT, attention_BT = gather(padded_b2T).rows_BD.unbind(1)
    return ids_BT, attention_BT.bool()
