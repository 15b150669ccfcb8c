"""Examples in the prompt (Flamingo, arXiv:2204.14198, 2.5 and appendix A.2): which ones, and in what order.

RICES takes the support images that the frozen vision tower finds nearest to the query's, the nearest last. Without
shots, two examples are given as text, without their images. An ensemble takes the mean over several orders of the
shots. `Shots` puts examples before the questions of any evaluation that writes; `FewShot` ranks candidate captions.
"""

# R rows or queries, each an image and its caption  S rows of the support  K shots  C candidates, the right one first
# F width of the tower's features

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, permutations
from math import factorial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bridgework.config import added, config_class
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import (
    Better,
    EvalExample,
    Result,
    draw,
    draw_pairs,
    prefix_metrics,
    question_of,
)
from bridgework.evaluation.likelihood import draw_candidates, share_first_best
from bridgework.system import Scoring

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline
    from bridgework.inference.preprocess import EncodedImage, ImageFile

TEXT_ONLY = 2  # examples without an image where there are no shots (A.2)
CHUNK = 64  # images whose features are in memory at once while they are compared


class ShotExample(NamedTuple):
    """One example: the question about its image, and the answer."""

    question: str
    answer: str


class FewShotQuestion(NamedTuple):
    """Questions, each after its examples."""

    conversations: list[list[Part]]
    pictures: "list[list[ImageFile]]"  # of each: those of the examples, then the query's


@dataclass(frozen=True)
class Support:
    """Rows that examples are taken from, each with one picture."""

    shots: Sequence[ShotExample]
    pictures: "Sequence[ImageFile]"


class _Judge(Protocol):
    """The evaluation that asks."""

    @property
    def name(self) -> str: ...
    @property
    def dataset(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def seed(self) -> int: ...


@config_class
class Shots:
    """Examples before every question of an evaluation, of other images than the question's."""

    count: int = 4  # 0: two as text alone
    support: str | None = None  # dataset of the examples; None: the evaluation's own
    rows: int = 2_048  # of the support, drawn by the seed
    select: Literal["rices", "random"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise SpecError(f"shots.count is 0 or more, got {self.count}")
        if self.rows <= self.needed:
            raise SpecError(
                f"shots.rows must be above the {self.needed} examples of a prompt, got {self.rows}"
            )

    @property
    def needed(self) -> int:
        """Examples of a prompt."""
        return self.count or TEXT_ONLY

    @property
    def datasets(self) -> tuple[str, ...]:
        return () if self.support is None else (self.support,)

    def tiny(self) -> "Shots":
        support = None if self.support is None else "synthetic:shapes"
        return replace(self, count=min(self.count, 2), support=support, rows=8)

    def ask(
        self, pipeline: "Pipeline", home: Path, judge: _Judge, samples: Sequence[Sample]
    ) -> FewShotQuestion:
        """Return each sample's question after its examples.

        Raises DataError for a sample without exactly one picture, and for too few rows of support.
        """
        where = judge.dataset if self.support is None else self.support
        wanted = _Wanted(judge.name, where, self.rows, judge.prompts, self.seed)
        support = support_of(pipeline, draw(wanted, pipeline, home), judge.prompts)
        queries = [_picture(pipeline, sample, judge.name) for sample in samples]
        chosen = self.choose(pipeline, queries, support.pictures, judge.name)
        asked = FewShotQuestion([], [])
        for sample, query, places in zip(samples, queries, chosen, strict=True):
            question = _text(question_of(pipeline, sample, judge.prompts or None))
            shots = [support.shots[i] for i in places]
            asked.conversations.append(prompt(shots, question, shown=bool(self.count)))
            asked.pictures.append([*(support.pictures[i] for i in places if self.count), query])
        return asked

    def choose(
        self,
        pipeline: "Pipeline",
        queries: "Sequence[ImageFile]",
        pictures: "Sequence[ImageFile]",
        name: str,
    ) -> list[list[int]]:
        """Return for every query the places of its examples among `pictures`, never one of the same picture."""
        places: dict[ImageFile, list[int]] = {}
        for place, picture in enumerate(pictures):
            places.setdefault(picture, []).append(place)
        own = [places.get(query, []) for query in queries]
        if self.needed > len(pictures) - max(map(len, own), default=0):
            raise DataError(
                f"{name}: {len(pictures)} rows of support are too few for {self.needed} examples of other images"
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
            chosen.append(random.Random(f"{self.seed}:{row}").sample(free, self.needed))
        return chosen


class _Wanted(NamedTuple):
    """The rows of a support, as `draw` reads them."""

    name: str
    dataset: str
    rows: int
    prompts: tuple[str, ...]
    seed: int


def support_of(
    pipeline: "Pipeline", items: Sequence[EvalExample], prompts: Sequence[str]
) -> Support:
    """Return the rows with one picture and one answer, each asked as the evaluation asks."""
    shots, pictures = list[ShotExample](), list["ImageFile"]()
    for item in items:
        shown, parts = (
            pipeline.inputs.pictures(item.sample),
            pipeline.inputs.ask(item.sample, prompts or None),
        )
        answers = [
            part.text
            for part in parts
            if part.text is not None and part.role in ("caption", "assistant")
        ]
        if len(shown) == 1 and len(answers) == 1:
            shots.append(ShotExample(_text(parts), answers[0]))
            pictures.append(shown[0])
    return Support(shots, pictures)


@config_class
class FewShot:
    """Share of rows whose own caption is the likeliest of `candidates` behind `shots` examples: `accuracy`.

    The examples are other rows of the same dataset, or rows of `support`.
    """

    better: ClassVar[Better] = {"accuracy": "higher", "chance": None}
    name: str = "few_shot"
    dataset: str
    support: str | None = None
    shots: int = 4
    select: Literal["rices", "random"] = "rices"
    orders: int = 1  # of the shots, whose mean log-likelihood decides; the paper's ensembles take 6
    rows: int = 100
    candidates: int = 20
    prompts: tuple[str, ...] = ("Output:",)  # what stands before every answer (appendix A.2)
    seed: int = 0
    scoring: Scoring = added(default=Scoring(prior=False))

    def __post_init__(self) -> None:
        if self.shots < 0 or self.orders < 1:
            raise SpecError(
                f"{self.name}: shots is 0 or more and orders 1 or more, got {self.shots} and {self.orders}"
            )
        if not 2 <= self.candidates <= self.rows:
            raise SpecError(
                f"{self.name}.candidates must lie between 2 and rows ({self.rows}), got {self.candidates}"
            )
        if self.support is None and self.rows <= (self.shots or TEXT_ONLY):
            raise SpecError(
                f"{self.name}: {self.rows} rows are too few to take {self.shots} other ones as examples"
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        return (self.dataset,) if self.support is None else (self.dataset, self.support)

    @property
    def _shots(self) -> Shots:
        needed = self.shots or TEXT_ONLY
        return Shots(count=self.shots, support=self.support, rows=max(self.rows, needed + 1), select=self.select,
                     seed=self.seed)  # fmt: skip

    def tiny(self) -> "FewShot":
        here = "synthetic:shapes"
        return replace(
            self,
            dataset=here,
            support=None if self.support is None else here,
            shots=min(self.shots, 2),
            orders=min(self.orders, 2),
            rows=8,
            candidates=3,
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for a dataset with too few pairs."""
        shots = self._shots
        items = draw_pairs(self, pipeline, home, at_least=max(self.candidates, shots.needed + 1))
        pool = items
        if self.support is not None:
            wanted = replace(self, dataset=self.support)
            pool = draw_pairs(wanted, pipeline, home, at_least=shots.needed)
        queries, pictures = ([item.sample.images[0] for item in rows] for rows in (items, pool))
        chosen = shots.choose(pipeline, queries, pictures, self.name)
        captions_RC = draw_candidates(len(items), self.candidates, self.seed).tolist()
        judged = []
        for row, own_C in enumerate(captions_RC):
            *shown, query = pipeline.inputs.encode_images(
                [*(pictures[i] for i in chosen[row]), queries[row]]
            )
            examples = {i: (pool[i], seen) for i, seen in zip(chosen[row], shown, strict=True)}
            judged.append(
                self._judge(pipeline, query, [items[c].sample.text for c in own_C], examples)
            )
        return Result(
            prefix_metrics(
                self,
                {"accuracy": share_first_best(torch.stack(judged)), "chance": 1 / self.candidates},
            )
        )

    def demonstrate(
        self, pipeline: "Pipeline", image: bytes, home: Path
    ) -> tuple[list[Part], list[bytes]]:
        """The conversation about an image of the caller's after examples from `dataset`, and all images that it shows.

        Raises DataError for a dataset with too few pairs.
        """
        pool = draw_pairs(self, pipeline, home, at_least=self._shots.needed)
        pictures = [item.sample.images[0] for item in pool]
        (chosen,) = self._shots.choose(pipeline, [image], pictures, self.name)
        shots = [ShotExample(self.prompts[0], pool[i].sample.text) for i in chosen]
        shown = [pictures[i] for i in chosen] if self.shots else []
        return prompt(shots, self.prompts[0], shown=bool(self.shots)), [*shown, image]

    def _judge(
        self,
        pipeline: "Pipeline",
        query: "EncodedImage",
        texts: list[str],
        examples: Mapping[int, "tuple[EvalExample, EncodedImage]"],
    ) -> Tensor:
        """(C,) scores of each text about one image, as the mean over the orders of its examples."""
        question, scores = self.prompts[0], []
        for order in example_orders(list(examples), self.orders, self.seed):
            shots = [ShotExample(question, examples[i][0].sample.text) for i in order]
            shown = [examples[i][1] for i in order] if self.shots else []
            asked = prompt(shots, question, shown=bool(self.shots))
            ranked = pipeline.rank_answers(
                asked, [*shown, query], [f" {text}" for text in texts], scoring=self.scoring
            )
            found = {one.candidate: one.score for one in ranked}
            scores.append(torch.tensor([found[f" {text}"] for text in texts]))
        return torch.stack(scores).mean(0)


def prompt(shots: Sequence[ShotExample], question: str, *, shown: bool = True) -> list[Part]:
    """A conversation that ends where the answer about the last image is due; without `shown`, shots have no image."""
    parts = []
    for image, shot in enumerate(shots):
        parts += [Part("user", image=image)] * shown
        parts += [Part("user", text=shot.question)] * bool(shot.question)
        parts += [Part("assistant", text=f" {shot.answer}")]
    asked = [Part("user", text=question)] * bool(question)
    return [*parts, Part("user", image=len(shots) if shown else 0), *asked]


def rices_features(pipeline: "Pipeline", pictures: "Sequence[ImageFile]") -> Tensor:
    """(N, F) float32 of length 1, by which RICES compares: of a video, the mean over its frames."""
    vectors = []
    for start in range(0, len(pictures), CHUNK):
        squares = [
            list(p) if isinstance(p, tuple) else [p] for p in pictures[start : start + CHUNK]
        ]
        features_NPF = pipeline.inputs.features([square for of_one in squares for square in of_one])
        for seen_nPF in features_NPF.split([len(of_one) for of_one in squares]):
            vectors.append(pool_features(seen_nPF.flatten(0, 1).unsqueeze(0)).cpu())
    return torch.cat(vectors)


def pool_features(features_RPF: Tensor) -> Tensor:
    """(R, F) float32 of length 1: the mean of what the vision tower sees."""
    return normalize(features_RPF.float().mean(1), dim=-1)


def rices(
    queries_RF: Tensor, support_SF: Tensor, count: int, own: Sequence[int] | Tensor | None = None
) -> list[list[int]]:
    """For each query the `count` nearest of the support, the nearest last.

    own: its own place in the support, or (R, S) bool of all its own places, which are left out.
    """
    alike_RS = queries_RF @ support_SF.T
    if isinstance(own, Tensor):
        alike_RS = alike_RS.masked_fill(own, -torch.inf)
    elif own is not None:
        alike_RS[torch.arange(len(own)), torch.tensor(own)] = -torch.inf
    nearest: list[list[int]] = alike_RS.topk(count, dim=1).indices.flip(1).tolist()
    return nearest


def example_orders(chosen: Sequence[int], count: int, seed: int = 0) -> list[list[int]]:
    """The given order alone, or `count` different ones: the same, whatever order the shots come in."""
    if count == 1:
        return [list(chosen)]
    known = sorted(chosen)
    if factorial(len(known)) <= count:
        return [list(order) for order in permutations(known)]
    draw, found = random.Random(f"{seed}:{known}"), dict[tuple[int, ...], None]()
    while len(found) < count:
        found[tuple(draw.sample(known, len(known)))] = None
    return [list(order) for order in islice(found, count)]


def _picture(pipeline: "Pipeline", sample: Sample, name: str) -> "ImageFile":
    pictures = pipeline.inputs.pictures(sample)
    if len(pictures) != 1:
        raise DataError(
            f"{name}: a question after examples is about one picture; row {sample.key} shows {len(pictures)}"
        )
    return pictures[0]


def _text(parts: Sequence[Part]) -> str:
    """The question alone, without the line break that sets it off from its image."""
    return "".join(
        part.text for part in parts if part.text is not None and part.role == "user"
    ).strip("\n")
