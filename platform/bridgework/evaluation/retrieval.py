"""Image-text retrieval: recall at 1, 5 and 10 in both directions, optionally with reranking."""

# R rows, each an image and its texts  C texts of all rows  Q vectors of an image  D width
# X by Y: R by C or C by R  K candidates

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bridgework.config import config_class
from bridgework.errors import SpecError
from bridgework.evaluation.base import Better, Result, build_result, draw_pairs
from bridgework.evaluation.statistics import EvaluatedRows, RowValues

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

CUTS = (1, 5, 10)  # k of recall at k
OUT = 100.0  # subtracted from columns that are not candidates: larger than any logit
Matcher = Callable[[int, Tensor], Tensor]  # a row and its candidates (K,): their logits (K,)


@config_class
class Retrieval:
    """R@1, R@5 and R@10 in [0, 1] among all rows, e.g.

    `image_to_text_r1`, with `chance_r1` of a text.

    For an image with several texts, as in COCO and Flickr30k, one of them is enough. With `rerank`,
    the matching head scores the nearest candidates again (BLIP, arXiv:2201.12086, 5.1); all
    features are then in memory.
    """

    better: ClassVar[Better] = {
        **{f"{way}_r{cut}": "higher" for way in ("image_to_text", "text_to_image") for cut in CUTS},
        **{f"chance_r{cut}": None for cut in CUTS},
    }
    name: str = "retrieval"
    dataset: str
    rows: int = 300
    rerank: int = 0  # candidates per row; 0: no reranking
    prompts: tuple[str, ...] = ()  # questions for pairs; empty: the stage's own
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise SpecError(
                f"{self.name}.rows: got {self.rows}; expected at least 2, "
                "because one row is always right"
            )
        if self.rerank < 0:
            raise SpecError(f"{self.name}.rerank: got {self.rerank}; expected 0 or more")

    def tiny(self) -> "Retrieval":
        """Return a copy with at most 16 synthetic rows and 4 candidates."""
        return replace(
            self, dataset="synthetic:shapes", rows=min(self.rows, 16), rerank=min(self.rerank, 4)
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Embed and compare the rows. Raises DataError for a dataset with fewer than two pairs."""
        examples = draw_pairs(self, pipeline, home, at_least=2, several=True)
        features_RPF = pipeline.inputs.features([example.squares[0] for example in examples])
        texts = [text for example in examples for text in example.texts]
        row_C = [row for row, example in enumerate(examples) for _ in example.texts]
        own_RC = torch.arange(len(examples)).unsqueeze(1) == torch.tensor(row_C)
        vectors_CD = pipeline.embed_texts(texts)
        cosine_RC = similarity(pipeline.embed_images(features_RPF), vectors_CD).cpu()
        to_text_RC, to_image_CR = cosine_RC, cosine_RC.T
        if self.rerank:
            text_matcher = _text_matcher(pipeline, features_RPF, texts)
            image_matcher = _image_matcher(pipeline, features_RPF, texts)
            to_text_RC = reranked(cosine_RC, text_matcher, self.rerank)
            to_image_CR = reranked(cosine_RC.T, image_matcher, self.rerank)
        images = EvaluatedRows.of([example.sample for example in examples])
        captions = EvaluatedRows.of([examples[row].sample for row in row_C])
        values: dict[str, float | RowValues] = {}
        for cut in CUTS:
            values[f"image_to_text_r{cut}"] = images.values(within(to_text_RC, cut, own_RC))
            values[f"text_to_image_r{cut}"] = captions.values(within(to_image_CR, cut, own_RC.T))
            values[f"chance_r{cut}"] = min(1.0, cut / len(examples))
        return build_result(self, values)


def similarity(images: Tensor, texts_CD: Tensor) -> Tensor:
    """Return (R, C) cosines of images (R, D) or (R, Q, D) with texts, all of length 1.

    Of the Q vectors of an image, the nearest counts (BLIP-2, 2301.12597, 3.2).
    """
    cosine = images @ texts_CD.T
    return cosine.amax(1) if cosine.ndim == 3 else cosine


def within(score_RC: Tensor, cut: int, own_RC: Tensor | None = None) -> Tensor:
    """Return (R,) bool: rows with an own column among the `cut` largest scores.

    By default, the own columns are the diagonal. A tie with another column counts against the row.
    """
    own_RC = torch.eye(len(score_RC), dtype=torch.bool) if own_RC is None else own_RC
    best_R1 = score_RC.masked_fill(~own_RC, -torch.inf).amax(1, keepdim=True)
    better_R = ((score_RC >= best_R1) & ~own_RC).sum(1)
    return (better_R < cut) & own_RC.any(1)


def reranked(cosine_XY: Tensor, matcher: Matcher, keep: int) -> Tensor:
    """Return (X, Y) scores after reranking.

    In every row the `keep` nearest come first, by cosine plus matching logit; the others follow by
    cosine.
    """
    near_XK = cosine_XY.topk(min(keep, cosine_XY.shape[1]), dim=1).indices
    if not near_XK.shape[1]:
        return cosine_XY - OUT
    logits_XK = torch.stack([matcher(row, near_K).cpu() for row, near_K in enumerate(near_XK)])
    return (cosine_XY - OUT).scatter(1, near_XK, cosine_XY.gather(1, near_XK) + logits_XK)


def _text_matcher(pipeline: "Pipeline", features_RPF: Tensor, texts: list[str]) -> Matcher:
    def match(row: int, near_K: Tensor) -> Tensor:
        image_KPF = features_RPF[row].expand(len(near_K), -1, -1)
        return pipeline.match(image_KPF, [texts[column] for column in near_K.tolist()])

    return match


def _image_matcher(pipeline: "Pipeline", features_RPF: Tensor, texts: list[str]) -> Matcher:
    def match(row: int, near_K: Tensor) -> Tensor:
        images_KPF = features_RPF[near_K.to(features_RPF.device)]
        return pipeline.match(images_KPF, [texts[row]] * len(near_K))

    return match
