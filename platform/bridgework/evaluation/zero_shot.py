"""Does the model know a class by its name alone? The nearest of the classes' texts (CLIP, arXiv:2103.00020, 3.1)."""

# R rows, each an image and its labels  C classes  P prompts  D width

from collections.abc import Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bridgework.config import config_class
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import Better, Result, draw_images, prefix_metrics
from bridgework.evaluation.retrieval import recall, similarity

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

CUTS = (1, 5)
TEMPLATES = (  # the first is the paper's default (3.1.4); the others vary what is common in photographs of one thing
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up of a {}.",
    "a blurry picture of a {}.",
    "a bright picture of a {}.",
    "a dark picture of a {}.",
    "a {} seen from afar.",
    "a drawing of a {}.",
    "many of them: {}.",
    "this is a {}, cropped.",
)


@config_class
class ZeroShot:
    """Share of images one of whose labels is the nearest class (`top1`), or among the nearest five (`top5`).

    A class is the mean of its prompts' vectors. Beside them stand `chance_top1` and `chance_top5`.
    """

    better: ClassVar[Better] = {
        **{f"top{cut}": "higher" for cut in CUTS},
        **{f"chance_top{cut}": None for cut in CUTS},
    }
    name: str = "zero_shot"
    dataset: str
    rows: int = 1_000
    classes: tuple[str, ...] = ()  # empty: every label that the rows have
    templates: tuple[str, ...] = TEMPLATES
    prompts: tuple[str, ...] = ()  # of the stage; a class is not asked for
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SpecError(f"{self.name}.rows must be at least 1, got {self.rows}")
        if bad := [template for template in self.templates if template.count("{}") != 1]:
            raise SpecError(
                f"{self.name}.templates: {bad[0]!r} must hold {{}} once, where the class goes"
            )
        if not self.templates:
            raise SpecError(f"{self.name}.templates is empty; the plainest is '{{}}'")

    def tiny(self) -> "ZeroShot":
        return replace(self, dataset="synthetic:shapes", rows=min(self.rows, 16), classes=())

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for a dataset whose rows have no image with a label, or fewer than two classes."""
        items = draw_images(self, pipeline, home, lambda sample: bool(sample.labels))
        classes = self.classes or sorted({label for item in items for label in item.sample.labels})
        if len(classes) < 2:
            raise DataError(
                f"{self.name}: {len(items)} of the rows drawn from {self.dataset} have one image and a label, and "
                f"there are {len(classes)} classes; it needs two, and samples with `labels`"
            )
        images = pipeline.embed_images([item.squares[0] for item in items])
        alike_RC = similarity(images, class_vectors(pipeline, classes, self.templates)).cpu()
        right_RC = torch.tensor(
            [[name in item.sample.labels for name in classes] for item in items]
        )
        values: dict[str, float] = {}
        for cut in CUTS:
            values[f"top{cut}"] = recall(alike_RC, cut, right_RC)
            values[f"chance_top{cut}"] = chance(right_RC, cut)
        return Result(prefix_metrics(self, values))


def class_vectors(pipeline: "Pipeline", classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(C, D) of length 1: the mean over the templates of each class's vectors, which are of length 1 themselves."""
    texts_ND = pipeline.embed_texts(
        [template.replace("{}", name) for name in classes for template in templates]
    )
    return normalize(texts_ND.unflatten(0, (len(classes), len(templates))).mean(1), dim=-1)


def chance(right_RC: Tensor, cut: int) -> float:
    """How often one of a row's right classes is among `cut` drawn without looking."""
    classes = right_RC.shape[1]
    drawn = min(cut, classes)
    misses = [
        comb(classes - right, drawn) / comb(classes, drawn) for right in right_RC.sum(1).tolist()
    ]
    return 1 - sum(misses) / len(misses)
