"""Do this image and this text belong together? Two classes, judged on pairs that are hard to tell apart.

Image-text matching of ALBEF and BLIP (Li et al. 2022, arXiv:2201.12086, 3.3). Each sample is judged three times: its
own pair, its text with a negative image, its image with a negative text. A wiring runs its matching head on what
`judged_pairs` lays out and gives `by_sample` of the logits as `match_B3C`.
"""

# b samples of this rank  K candidates: this rank's samples, or all ranks'  T tokens  P patches  F their width
# Q vectors of an image  D width  M = 3b pairs  B samples judged  C classes

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from bridgework import rng
from bridgework.config import added, config_class
from bridgework.errors import DataError, SpecError
from bridgework.losses.gather import gather

_ODD = tuple(odd - 2**64 for odd in rng.ODD)  # as signed int64
FLOOR = 1e-4  # of BLIP's pretraining (blip_pretrain.py); its retrieval and BLIP-2 have none


class Judged(Protocol):
    """The outputs that the loss reads."""

    @property
    def match_B3C(self) -> Tensor | None: ...


@config_class
class Matching:
    """Cross-entropy of match (class 1) or no match (class 0) over a sample's pair and its two negatives.

    A negative is drawn with a probability that grows with its similarity, see `hard_negatives`. Candidates are the
    samples of one lane (a fixed slice of the batch: what one worker of a release holds, on any number of workers), of
    this rank, or of all ranks. The draws are the same for any number of workers, unless they are of a rank.
    """

    negatives: Literal["rank", "lane", "all"] = "rank"
    weight: float = 1.0
    floor: float = added(
        default=FLOOR
    )  # added to every candidate's probability, so that an easy one may come too
    whole_batch: ClassVar[bool] = True
    supports_packing: ClassVar[bool] = False
    cached_outputs: ClassVar[
        tuple[str, ...]
    ] = ()  # a negative brings its image tokens, gradient and all
    by_image: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise SpecError(f"losses.matching.floor is a probability in [0, 1), got {self.floor:g}")

    @property
    def requires(self) -> str:
        """`match` for negatives of this rank, `match_lane` or `match_all`."""
        return "match" if self.negatives == "rank" else f"match_{self.negatives}"

    @property
    def options(self) -> Mapping[str, float]:
        """Arguments of the wiring's forward, which draws the negatives."""
        return {"floor": self.floor}

    def __call__(self, outputs: Judged) -> Tensor:
        """(B,) float32: the unweighted sum over the three judgments of each sample."""
        if outputs.match_B3C is None:
            raise DataError(
                f"the matching loss reads judged pairs; ask the wiring for {self.requires!r}"
            )
        return matching(outputs.match_B3C)

    def count(self, labels_BT: Tensor) -> Tensor:
        """(B,) float32: three judgments a sample."""
        return torch.full((len(labels_BT),), 3.0, device=labels_BT.device)


def matching(match_B3C: Tensor) -> Tensor:
    """(B,) summed cross-entropy; of the three, the first is a match and the others are not."""
    truth_B3 = torch.tensor([1, 0, 0], device=match_B3C.device).expand(len(match_B3C), 3)
    nats_B3 = cross_entropy(
        match_B3C.float().flatten(0, 1), truth_B3.flatten(), reduction="none"
    ).view(-1, 3)
    return nats_B3.sum(1)


class Pairs(NamedTuple):
    """What the matching head reads: all own pairs, then own texts with a negative image, then negative texts."""

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
    """The pairs to judge, with hard negatives of this rank, of the same lane, or (`everywhere`) of all ranks.

    image_bQD (of several vectors the nearest counts) and text_bD are of unit length; `scale` is one over the
    temperature; rows of one identity (0 or more) show one image and are no negatives of each other; `lane_b` (int64)
    keeps to rows of the same lane, all of which are on this rank. The gradient of an image's tokens comes from all
    ranks. Raises DataError where a sample has no negative.
    """
    offset, images_KPF = 0, images_bPF
    ids_KT, attention_KT, image_KQD, text_KD, identity_K = (
        ids_bT,
        attention_bT,
        image_bQD,
        text_bD,
        identity_b,
    )
    seed = torch.tensor([rng.step_seed() % 2**31], device=ids_bT.device)
    if everywhere or lane_b is not None:
        seed = gather(seed).rows_BD[:1]
    if everywhere:
        ids_KT, attention_KT = gather_texts(ids_bT, attention_bT)
        images_KPF, offset = gather(images_bPF)
        image_KQD, text_KD = gather(image_bQD.detach()).rows_BD, gather(text_bD.detach()).rows_BD
        identity_K = None if identity_b is None else gather(identity_b).rows_BD
    own_bK = positive_mask(
        len(ids_bT), len(ids_KT), offset, identity_b, identity_K, device=ids_bT.device
    )
    keys_b, keys_K = _keys(ids_bT * attention_bT), _keys(ids_KT * attention_KT)
    to_image_bK, to_text_bK = (
        nearest(text_bD, image_KQD) * scale,
        nearest(text_KD, image_bQD).T * scale,
    )
    if lane_b is not None:
        other_bK = lane_b[:, None] != lane_b
        own_bK = own_bK | other_bK
        to_image_bK, to_text_bK = (
            to_bK.masked_fill(other_bK, -torch.inf) for to_bK in (to_image_bK, to_text_bK)
        )
    image_b = hard_negatives(to_image_bK, own_bK, hash_uniform(keys_b, keys_K, seed), floor)
    text_b = hard_negatives(to_text_bK, own_bK, hash_uniform(keys_b, keys_K, seed + 1), floor)
    wider = (0, ids_KT.shape[1] - ids_bT.shape[1])
    own_ids_bT, own_attention_bT = pad(ids_bT, wider), pad(attention_bT, wider)
    return Pairs(
        torch.cat([own_ids_bT, own_ids_bT, ids_KT[text_b]]),
        torch.cat([own_attention_bT, own_attention_bT, attention_KT[text_b]]),
        torch.cat([images_bPF, images_KPF[image_b], images_bPF]),
    )


def group_by_sample(logits_MC: Tensor) -> Tensor:
    """(b, 3, C): the three judgments of each sample, of logits in the order of `judged_pairs`."""
    return logits_MC.view(3, -1, logits_MC.shape[-1]).transpose(0, 1)


@torch.no_grad()
def nearest(text_XD: Tensor, image_YQD: Tensor) -> Tensor:
    """(X, Y) float32 cosines: each text with the nearest of an image's vectors; all are of unit length."""
    cosine_XYQ: Tensor = torch.einsum("xd,yqd->xyq", text_XD.float(), image_YQD.float())
    return cosine_XYQ.amax(-1)


@torch.no_grad()
def hard_negatives(
    similar_bK: Tensor, own_bK: Tensor, uniform_bK: Tensor, floor: float = FLOOR
) -> Tensor:
    """(b,) int64: for every row a candidate that is not its own, the likelier the more similar.

    similar_bK are similarities over the temperature, own_bK (bool) is true where a candidate belongs to the row,
    uniform_bK (float64, in (0, 1)) is the chance that decides. With a floor, probabilities are the softmax over all
    candidates, the row's own among them, plus the floor, and then its own are left out (BLIP, blip_pretrain.py);
    without, they are the softmax over the others alone (LAVIS, blip2_qformer.py). Raises DataError for a row to which
    every candidate belongs.
    """
    if bool(own_bK.all(1).any()):
        raise DataError(
            f"a sample has no negative among {own_bK.shape[1]} candidates: matching needs 2 samples of different "
            "images on every rank, or in every lane where negatives are of a lane; raise budget.batch or budget.micro, "
            "or take losses.matching.negatives=all"
        )
    nats_bK = (
        similar_bK.double()
        if floor == 0
        else (similar_bK.float().softmax(1).double() + floor).log()
    )
    gumbel_bK = -(
        -uniform_bK.log()
    ).log()  # the largest of log-chances with this noise is one draw from the chances
    return (nats_bK.masked_fill(own_bK, -torch.inf) + gumbel_bK).argmax(1)


def hash_uniform(rows_b: Tensor, columns_K: Tensor, seed: Tensor) -> Tensor:
    """(b, K) float64 in (0, 1), from the keys of a row and a column: on whatever rank the two meet, the same."""
    return rng.unit(rng.mix(rows_b[:, None] * _ODD[0] + columns_K * _ODD[1] + seed))


def _keys(ids_bT: Tensor) -> Tensor:
    """(b,) int64 of each text, whatever its padding (0) is."""
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
    """(b, K) bool: the candidates that belong to row i: itself, at `offset` + i, and those of its identity.

    An identity is 0 or more; below, it is not known.
    """
    own_b = torch.arange(offset, offset + rows, device=device)
    own_bK = own_b[:, None] == torch.arange(columns, device=device)
    if identity_b is None or identity_K is None:
        return own_bK
    return own_bK | ((identity_b[:, None] == identity_K) & (identity_b[:, None] >= 0))


def gather_texts(ids_bT: Tensor, attention_bT: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, attention) of all ranks in their order, padded on the right to the widest rank's T."""
    width = torch.tensor(ids_bT.shape[1], device=ids_bT.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(width, dist.ReduceOp.MAX)
    both_b2T = torch.stack([ids_bT, attention_bT.to(ids_bT.dtype)], dim=1)
    ids_BT, attention_BT = gather(pad(both_b2T, (0, int(width) - ids_bT.shape[1]))).rows_BD.unbind(
        1
    )
    return ids_BT, attention_BT.bool()
