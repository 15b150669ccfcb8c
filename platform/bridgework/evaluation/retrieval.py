"""Do the bridge's tokens say what the caption says? Nearest neighbors of pooled vectors, both ways."""

# R rows, each an image and its texts  C texts of all rows  Q vectors of an image  D width
# X by Y: R by C, or the other way round  K candidates

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bridgework.config import config_class
from bridgework.errors import SpecError
from bridgework.evaluation.base import Better, Result, draw_pairs, prefix_metrics

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

CUTS = (1, 5, 10)
OUT = 100.0  # taken off what is no candidate: no logit reaches so far
Judge = Callable[[int, Tensor], Tensor]  # a row and its candidates (K,): their logits (K,)


@config_class
class Retrieval:
    """R@1, R@5 and R@10 in [0, 1] among all rows: `image_to_text_r1` and so on, beside `chance_r1` of a text.

    An image with several texts, as in COCO and Flickr30k, has found one if it has found any. With `rerank`, the
    matching head judges the nearest candidates again (BLIP, arXiv:2201.12086, 5.1); all features are then in memory.
    """

    better: ClassVar[Better] = {
        **{f"{way}_r{cut}": "higher" for way in ("image_to_text", "text_to_image") for cut in CUTS},
        **{f"chance_r{cut}": None for cut in CUTS},
    }
    name: str = "retrieval"
    dataset: str
    rows: int = 300
    rerank: int = 0  # candidates of every row; 0: the vectors alone decide
    prompts: tuple[str, ...] = ()  # what pairs are asked with; empty: the stage's own
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise SpecError(
                f"{self.name}.rows must be at least 2, got {self.rows}: one row is always right"
            )
        if self.rerank < 0:
            raise SpecError(f"{self.name}.rerank is 0 or more, got {self.rerank}")

    def tiny(self) -> "Retrieval":
        return replace(
            self, dataset="synthetic:shapes", rows=min(self.rows, 16), rerank=min(self.rerank, 4)
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for a dataset with fewer than two pairs."""
        items = draw_pairs(self, pipeline, home, at_least=2, several=True)
        texts = [(row, text) for row, item in enumerate(items) for text in item.texts]
        seen_RPF = pipeline.inputs.features([item.squares[0] for item in items])
        said = [text for _, text in texts]
        alike_RC = similarity(pipeline.embed_images(seen_RPF), pipeline.embed_texts(said)).cpu()
        own_RC = torch.arange(len(items)).unsqueeze(1) == torch.tensor([row for row, _ in texts])
        to_text_RC, to_image_CR = alike_RC, alike_RC.T
        if self.rerank:
            to_text_RC = reranked(alike_RC, _judge_texts(pipeline, seen_RPF, said), self.rerank)
            to_image_CR = reranked(alike_RC.T, _judge_images(pipeline, seen_RPF, said), self.rerank)
        values: dict[str, float] = {}
        for cut in CUTS:
            values[f"image_to_text_r{cut}"] = recall(to_text_RC, cut, own_RC)
            values[f"text_to_image_r{cut}"] = recall(to_image_CR, cut, own_RC.T)
            values[f"chance_r{cut}"] = min(1.0, cut / len(items))
        return Result(prefix_metrics(self, values))


def similarity(images: Tensor, texts_CD: Tensor) -> Tensor:
    """(R, C) cosines of images (R, D), or (R, Q, D), of which the nearest vector counts (BLIP-2, 2301.12597, 3.2)."""
    alike = images @ texts_CD.T
    return alike.amax(1) if alike.ndim == 3 else alike


def recall(alike_RC: Tensor, cut: int, own_RC: Tensor | None = None) -> float:
    """Share of rows one of whose own columns (the diagonal) is among the `cut` largest; a tie counts against it."""
    own_RC = torch.eye(len(alike_RC), dtype=torch.bool) if own_RC is None else own_RC
    best_R1 = alike_RC.masked_fill(~own_RC, -torch.inf).amax(1, keepdim=True)
    better_R = ((alike_RC >= best_R1) & ~own_RC).sum(1)
    return float(((better_R < cut) & own_RC.any(1)).double().mean())


def reranked(alike_XY: Tensor, judge: Judge, keep: int) -> Tensor:
    """(X, Y): in every row the `keep` nearest come first, by cosine plus matching logit; the others by cosine."""
    near_XK = alike_XY.topk(min(keep, alike_XY.shape[1]), dim=1).indices
    if not near_XK.shape[1]:
        return alike_XY - OUT
    logits_XK = torch.stack([judge(row, near_K).cpu() for row, near_K in enumerate(near_XK)])
    return (alike_XY - OUT).scatter(1, near_XK, alike_XY.gather(1, near_XK) + logits_XK)


def _judge_texts(pipeline: "Pipeline", seen_RPF: Tensor, said: list[str]) -> Judge:
    def judge(row: int, near_K: Tensor) -> Tensor:
        seen_KPF = seen_RPF[row].expand(len(near_K), -1, -1)
        return pipeline.match(seen_KPF, [said[column] for column in near_K.tolist()])

    return judge


def _judge_images(pipeline: "Pipeline", seen_RPF: Tensor, said: list[str]) -> Judge:
    def judge(row: int, near_K: Tensor) -> Tensor:
        return pipeline.match(seen_RPF[near_K.to(seen_RPF.device)], [said[row]] * len(near_K))

    return judge
