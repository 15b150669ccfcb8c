"""Few-shot prompts: choice and order of examples (Flamingo, arXiv:2204.14198, 2.5 and A.2).

RICES chooses the support images nearest to the query image by features of the frozen vision tower;
the nearest comes last. Without shots, two examples are given as text, without their images. An
ensemble takes the mean over several orders of the shots. `Shots` adds examples to the questions of
any evaluation that generates; `FewShot` ranks candidate captions.
"""

# R rows or queries, each an image and its caption  S rows of the support  K shots
# C candidates, the right one first  F width of the tower's features  N images

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations
from math import factorial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bridgework.config import added, config_class
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import (
    Better,
    EvalExample,
    EvalRows,
    Result,
    RowsOf,
    build_result,
    draw,
    draw_pairs,
    question_of,
)
from bridgework.evaluation.likelihood import draw_candidates, first_is_best
from bridgework.evaluation.statistics import EvaluatedRows
from bridgework.system import Scoring

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline
    from bridgework.inference.preprocess import EncodedImage, ImageFile

TEXT_ONLY = 2  # examples without an image if there are no shots (A.2)
CHUNK = 64  # images whose features are in memory at once while they are compared


class ShotExample(NamedTuple):
    """Question and answer of one example."""

    question: str
    answer: str


class FewShotQuestion(NamedTuple):
    """Questions, each after its examples."""

    conversations: list[list[Part]]
    pictures: "list[list[ImageFile]]"  # per question: images of its examples, then its own


@dataclass(frozen=True)
class Support:
    """Rows from which examples are chosen, with one image each."""

    shots: Sequence[ShotExample]
    pictures: "Sequence[ImageFile]"


@config_class
class Shots:
    """Examples before every question of an evaluation, with other images than the question's."""

    count: int = 4  # 0: two examples as text only
    support: str | None = None  # dataset of the examples; None: the evaluation's own
    rows: int = 2_048  # of the support, drawn by the seed
    select: Literal["rices", "random"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise SpecError(f"shots.count: got {self.count}; expected 0 or more")
        if self.rows <= self.examples:
            raise SpecError(
                f"shots.rows: got {self.rows}; expected a number above the {self.examples} "
                "examples of a prompt"
            )

    @property
    def examples(self) -> int:
        """Number of examples in a prompt."""
        return self.count or TEXT_ONLY

    @property
    def datasets(self) -> tuple[str, ...]:
        """Datasets that are read in addition to the evaluation's own."""
        return () if self.support is None else (self.support,)

    def tiny(self) -> "Shots":
        """Return a copy with at most 2 examples from 8 synthetic rows."""
        support = None if self.support is None else "synthetic:shapes"
        return replace(self, count=min(self.count, 2), support=support, rows=8)

    def ask(
        self, pipeline: "Pipeline", home: Path, evaluation: EvalRows, samples: Sequence[Sample]
    ) -> FewShotQuestion:
        """Return each sample's question after its examples.

        Raises DataError for a sample without exactly one image, and for too few rows of support.
        """
        name, prompts = evaluation.name, evaluation.prompts
        dataset = evaluation.dataset if self.support is None else self.support
        rows = RowsOf(name, dataset, self.rows, prompts, self.seed)
        support = support_of(pipeline, draw(rows, pipeline, home), prompts)
        queries = [_single_picture(pipeline, sample, name) for sample in samples]
        chosen = self.choose(pipeline, queries, support.pictures, name)
        questions = FewShotQuestion([], [])
        for sample, query, places in zip(samples, queries, chosen, strict=True):
            question = _text(question_of(pipeline, sample, prompts or None))
            shots = [support.shots[i] for i in places]
            questions.conversations.append(prompt(shots, question, images=bool(self.count)))
            questions.pictures.append([*(support.pictures[i] for i in places if self.count), query])
        return questions

    def choose(
        self,
        pipeline: "Pipeline",
        queries: "Sequence[ImageFile]",
        pictures: "Sequence[ImageFile]",
        name: str,
    ) -> list[list[int]]:
        """Return the positions in `pictures` of every query's examples, never of the same image.

        Raises DataError if there are too few pictures; its message begins with `name`.
        """
        places: dict[ImageFile, list[int]] = {}
        for place, picture in enumerate(pictures):
            places.setdefault(picture, []).append(place)
        own = [places.get(query, []) for query in queries]
        if self.examples > len(pictures) - max(map(len, own), default=0):
            raise DataError(
                f"{name}: too few rows of support. Got {len(pictures)}; expected enough for "
                f"{self.examples} examples with other images. Fix: give more rows, or fewer shots"
            )
        if self.select == "rices" and self.count:
            own_RS = torch.zeros(len(queries), len(pictures), dtype=torch.bool)
            for row, same in enumerate(own):
                own_RS[row, same] = True
            return rices(
                rices_features(pipeline, queries),
                rices_features(pipeline, pictures),
                self.count,
                own_RS,
            )
        chosen = []
        for row, same in enumerate(own):
            free = [i for i in range(len(pictures)) if i not in same]
            chosen.append(random.Random(f"{self.seed}:{row}").sample(free, self.examples))
        return chosen


def support_of(
    pipeline: "Pipeline", rows: Sequence[EvalExample], prompts: Sequence[str]
) -> Support:
    """Return the rows with one image and one answer, with the question of the evaluation."""
    shots, pictures = list[ShotExample](), list["ImageFile"]()
    for row in rows:
        own = pipeline.inputs.pictures(row.sample)
        parts = pipeline.inputs.ask(row.sample, prompts or None)
        answers = [
            part.text
            for part in parts
            if part.text is not None and part.role in ("caption", "assistant")
        ]
        if len(own) == 1 and len(answers) == 1:
            shots.append(ShotExample(_text(parts), answers[0]))
            pictures.append(own[0])
    return Support(shots, pictures)


@config_class
class FewShot:
    """Share of rows whose own caption is the most likely of `candidates` after `shots` examples.

    The metric is `accuracy`. The examples are other rows of the same dataset, or rows of `support`.
    """

    better: ClassVar[Better] = {"accuracy": "higher", "chance": None}
    name: str = "few_shot"
    dataset: str
    support: str | None = None
    shots: int = 4
    select: Literal["rices", "random"] = "rices"
    orders: int = 1  # of the shots; ranking by the mean log-likelihood; the paper's ensembles use 6
    rows: int = 100
    candidates: int = 20
    prompts: tuple[str, ...] = ("Output:",)  # text before every answer (appendix A.2)
    seed: int = 0
    scoring: Scoring = added(default=Scoring(prior=False))

    def __post_init__(self) -> None:
        if self.shots < 0 or self.orders < 1:
            raise SpecError(
                f"{self.name}: shots is 0 or more and orders 1 or more. "
                f"Got {self.shots} and {self.orders}"
            )
        if not 2 <= self.candidates <= self.rows:
            raise SpecError(
                f"{self.name}.candidates: got {self.candidates}; expected 2 to rows ({self.rows})"
            )
        if self.support is None and self.rows <= (self.shots or TEXT_ONLY):
            raise SpecError(
                f"{self.name}: too few rows to use {self.shots} others as examples. "
                f"Got {self.rows}. Fix: increase rows, or set support"
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        """Datasets that the evaluation reads."""
        return (self.dataset,) if self.support is None else (self.dataset, self.support)

    @property
    def _shots(self) -> Shots:
        rows = max(self.rows, (self.shots or TEXT_ONLY) + 1)
        return Shots(
            count=self.shots, support=self.support, rows=rows, select=self.select, seed=self.seed
        )

    def tiny(self) -> "FewShot":
        """Return a copy with at most 2 shots and 2 orders, 3 candidates and 8 synthetic rows."""
        return replace(
            self,
            dataset="synthetic:shapes",
            support=None if self.support is None else "synthetic:shapes",
            shots=min(self.shots, 2),
            orders=min(self.orders, 2),
            rows=8,
            candidates=3,
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Rank the captions. Raises DataError for a dataset with too few pairs."""
        shots = self._shots
        at_least = max(self.candidates, shots.examples + 1)
        rows = draw_pairs(self, pipeline, home, at_least=at_least)
        pool = rows
        if self.support is not None:
            spec = replace(self, dataset=self.support)
            pool = draw_pairs(spec, pipeline, home, at_least=shots.examples)
        queries, pictures = ([row.sample.images[0] for row in some] for some in (rows, pool))
        chosen = shots.choose(pipeline, queries, pictures, self.name)
        captions_RC = draw_candidates(len(rows), self.candidates, self.seed).tolist()
        scores = []
        for row, own_C in enumerate(captions_RC):
            images = [*(pictures[i] for i in chosen[row]), queries[row]]
            *encoded, query = pipeline.inputs.encode_images(images)
            examples = {i: (pool[i], image) for i, image in zip(chosen[row], encoded, strict=True)}
            texts = [rows[c].sample.text for c in own_C]
            scores.append(self._score(pipeline, query, texts, examples))
        own = EvaluatedRows.of([row.sample for row in rows])
        accuracy = own.values(first_is_best(torch.stack(scores)))
        return build_result(self, {"accuracy": accuracy, "chance": 1 / self.candidates})

    def demonstrate(
        self, pipeline: "Pipeline", image: bytes, home: Path
    ) -> tuple[list[Part], list[bytes]]:
        """Return a conversation about `image` after examples from `dataset`, and all its images.

        Raises DataError for a dataset with too few pairs.
        """
        pool = draw_pairs(self, pipeline, home, at_least=self._shots.examples)
        pictures = [row.sample.images[0] for row in pool]
        (chosen,) = self._shots.choose(pipeline, [image], pictures, self.name)
        shots = [ShotExample(self.prompts[0], pool[i].sample.text) for i in chosen]
        images = [pictures[i] for i in chosen] if self.shots else []
        return prompt(shots, self.prompts[0], images=bool(self.shots)), [*images, image]

    def _score(
        self,
        pipeline: "Pipeline",
        query: "EncodedImage",
        texts: list[str],
        examples: Mapping[int, "tuple[EvalExample, EncodedImage]"],
    ) -> Tensor:
        """Return (C,) scores of the texts about one image: the mean over orders of the examples."""
        question, scores = self.prompts[0], []
        for order in example_orders(list(examples), self.orders, self.seed):
            shots = [ShotExample(question, examples[i][0].sample.text) for i in order]
            images = [examples[i][1] for i in order] if self.shots else []
            conversation = prompt(shots, question, images=bool(self.shots))
            candidates = [f" {text}" for text in texts]
            ranked = pipeline.rank_answers(
                conversation, [*images, query], candidates, scoring=self.scoring
            )
            by_candidate = {one.candidate: one.score for one in ranked}
            scores.append(torch.tensor([by_candidate[candidate] for candidate in candidates]))
        return torch.stack(scores).mean(0)


def prompt(shots: Sequence[ShotExample], question: str, *, images: bool = True) -> list[Part]:
    """Return a conversation up to the answer about its last image.

    Without `images`, the shots are text only.
    """
    parts = []
    for image, shot in enumerate(shots):
        parts += [Part("user", image=image)] * images
        parts += [Part("user", text=shot.question)] * bool(shot.question)
        parts += [Part("assistant", text=f" {shot.answer}")]
    last = [Part("user", text=question)] * bool(question)
    return [*parts, Part("user", image=len(shots) if images else 0), *last]


def rices_features(pipeline: "Pipeline", pictures: "Sequence[ImageFile]") -> Tensor:
    """Return (N, F) float32 features of length 1 for RICES.

    Of a video, the mean over its frames.
    """
    vectors = []
    for start in range(0, len(pictures), CHUNK):
        frames = [list(p) if isinstance(p, tuple) else [p] for p in pictures[start : start + CHUNK]]
        features_NPF = pipeline.inputs.features([frame for of_one in frames for frame in of_one])
        for features_nPF in features_NPF.split([len(of_one) for of_one in frames]):
            vectors.append(pool_features(features_nPF.flatten(0, 1).unsqueeze(0)).cpu())
    return torch.cat(vectors)


def pool_features(features_RPF: Tensor) -> Tensor:
    """Return (R, F) float32 of length 1: the mean over the tower's tokens, normalized."""
    return normalize(features_RPF.float().mean(1), dim=-1)


def rices(
    queries_RF: Tensor, support_SF: Tensor, count: int, own: Sequence[int] | Tensor | None = None
) -> list[list[int]]:
    """Return for each query the positions of the `count` nearest rows of the support, nearest last.

    `own` is excluded: per query its own position, or (R, S) bool of all positions with its image.
    """
    cosine_RS = queries_RF @ support_SF.T
    if isinstance(own, Tensor):
        cosine_RS = cosine_RS.masked_fill(own, -torch.inf)
    elif own is not None:
        cosine_RS[torch.arange(len(own)), torch.tensor(own)] = -torch.inf
    nearest: list[list[int]] = cosine_RS.topk(count, dim=1).indices.flip(1).tolist()
    return nearest


def example_orders(chosen: Sequence[int], count: int, seed: int = 0) -> list[list[int]]:
    """Return the given order if `count` is 1, otherwise `count` different orders of the shots.

    The orders do not depend on the given one. If there are not more than `count`, all are returned.
    """
    if count == 1:
        return [list(chosen)]
    shots = sorted(chosen)
    if factorial(len(shots)) <= count:
        return [list(order) for order in permutations(shots)]
    draw, orders = random.Random(f"{seed}:{shots}"), dict[tuple[int, ...], None]()
    while len(orders) < count:
        orders[tuple(draw.sample(shots, len(shots)))] = None
    return [list(order) for order in islice(orders, count)]


def _single_picture(pipeline: "Pipeline", sample: Sample, name: str) -> "ImageFile":
    pictures = pipeline.inputs.pictures(sample)
    if len(pictures) != 1:
        raise DataError(
            f"{name}: a question after examples is about one image. "
            f"Got {len(pictures)} in row {sample.key}; expected 1. Fix: set shots to none, "
            "or filter the dataset"
        )
    return pictures[0]


def _text(parts: Sequence[Part]) -> str:
    """Return the question without its image and the line break between them."""
    return "".join(
        part.text for part in parts if part.text is not None and part.role == "user"
    ).strip("\n")
