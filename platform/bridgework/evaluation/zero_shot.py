"""Zero-shot classification by the nearest class text (CLIP, arXiv:2103.00020, 3.1)."""

# R rows, each an image and its labels  C classes  N texts  D width

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
from bridgework.evaluation.base import Better, Result, build_result, draw_images
from bridgework.evaluation.retrieval import similarity, within
from bridgework.evaluation.statistics import EvaluatedRows, RowValues

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

CUTS = (1, 5)  # k of top-k
# the first is the paper's default (3.1.4); the others are common variations of photographs
TEMPLATES = (
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
    """Zero-shot accuracy: `top1` and `top5`.

    A prediction is right if it is one of the image's labels. The vector of a class is the mean over
    its prompts. `chance_top1` and `chance_top5` are the values of random classes.
    """

    better: ClassVar[Better] = {
        **{f"top{cut}": "higher" for cut in CUTS},
        **{f"chance_top{cut}": None for cut in CUTS},
    }
    name: str = "zero_shot"
    dataset: str
    rows: int = 1_000
    classes: tuple[str, ...] = ()  # empty: all labels of the rows
    templates: tuple[str, ...] = TEMPLATES
    prompts: tuple[str, ...] = ()  # not used; every evaluation has the field
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SpecError(f"{self.name}.rows: got {self.rows}; expected at least 1")
        if bad := [template for template in self.templates if template.count("{}") != 1]:
            raise SpecError(
                f"{self.name}.templates: {bad[0]!r} must hold {{}} once, in place of the class"
            )
        if not self.templates:
            raise SpecError(f"{self.name}.templates is empty. Fix: use '{{}}' for the class alone")

    def tiny(self) -> "ZeroShot":
        """Return a copy with at most 16 synthetic rows and their classes."""
        return replace(self, dataset="synthetic:shapes", rows=min(self.rows, 16), classes=())

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Classify the images.

        Raises DataError for rows without labels, or with fewer than two classes.
        """
        examples = draw_images(self, pipeline, home, lambda sample: bool(sample.labels))
        labels = {label for example in examples for label in example.sample.labels}
        classes = self.classes or sorted(labels)
        if len(classes) < 2:
            raise DataError(
                f"{self.name}: {len(examples)} of the rows drawn from {self.dataset} have one "
                f"image and a label. Got {len(classes)} classes; expected at least 2. "
                "Fix: give a dataset with `labels`, or set classes"
            )
        images = pipeline.embed_images([example.squares[0] for example in examples])
        cosine_RC = similarity(images, class_vectors(pipeline, classes, self.templates)).cpu()
        right_RC = torch.tensor(
            [[name in example.sample.labels for name in classes] for example in examples]
        )
        rows = EvaluatedRows.of([example.sample for example in examples])
        values: dict[str, float | RowValues] = {}
        for cut in CUTS:
            values[f"top{cut}"] = rows.values(within(cosine_RC, cut, right_RC))
            values[f"chance_top{cut}"] = chance(right_RC, cut)
        return build_result(self, values)


def class_vectors(pipeline: "Pipeline", classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return (C, D) vectors of length 1: the normalized mean over the templates of each class."""
    texts_ND = pipeline.embed_texts(
        [template.replace("{}", name) for name in classes for template in templates]
    )
    return normalize(texts_ND.unflatten(0, (len(classes), len(templates))).mean(1), dim=-1)


def chance(right_RC: Tensor, cut: int) -> float:
    """Return the mean probability that a right class of a row is among `cut` random ones."""
    classes = right_RC.shape[1]
    drawn = min(cut, classes)
    misses = [
        comb(classes - right, drawn) / comb(classes, drawn) for right in right_RC.sum(1).tolist()
    ]
    return 1 - sum(misses) / len(misses)
