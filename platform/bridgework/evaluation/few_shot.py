"""Learning from examples in the prompt (Flamingo, arXiv:2204.14198, 2.5 and appendix A.2): which ones, in what order.

RICES takes the support images that the frozen vision tower finds nearest to the query's, the nearest last. Without
shots, two examples are told without their images. An ensemble takes the mean over several orders of the shots.
"""

# R rows, each an image and its caption  K shots  C candidates, the right one first  F width of the tower's features

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, permutations
from math import factorial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bridgework.data.samples import Part
from bridgework.errors import SpecError
from bridgework.evaluation.ranking import candidates, first
from bridgework.evaluation.result import Better, Result, named
from bridgework.evaluation.rows import Item, draw_pairs
from bridgework.spec import spec

if TYPE_CHECKING:
    from bridgework.inference import Pipeline

TOLD = 2  # examples without an image where there are no shots (A.2)


class Shot(NamedTuple):
    """What is asked about an image, and the answer."""

    question: str
    answer: str


@spec
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

    def __post_init__(self) -> None:
        if self.shots < 0 or self.orders < 1:
            raise SpecError(f"{self.name}: shots is 0 or more and orders 1 or more, got {self.shots} and {self.orders}")
        if not 2 <= self.candidates <= self.rows:
            raise SpecError(f"{self.name}.candidates must lie between 2 and rows ({self.rows}), got {self.candidates}")
        if self.support is None and self.rows <= self._needed:
            raise SpecError(f"{self.name}: {self.rows} rows are too few to take {self.shots} other ones as examples")

    @property
    def _needed(self) -> int:
        return self.shots or TOLD

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
        pipeline = roomy(pipeline)
        items = draw_pairs(self, pipeline, home, at_least=max(self.candidates, self._needed + 1))
        pool = items
        if self.support is not None:
            wanted = replace(self, dataset=self.support)
            pool = draw_pairs(wanted, pipeline, home, at_least=self._needed)
        seen_RPF, told_RPF = (pipeline.inputs.features([i.squares[0] for i in rows]) for rows in (items, pool))
        chosen = self._choose(seen_RPF, told_RPF)
        captions_RC = candidates(len(items), self.candidates, self.seed).tolist()
        judged = []
        for row, own_C in enumerate(captions_RC):
            told = {i: (pool[i], told_RPF[i]) for i in chosen[row]}
            judged.append(self._judge(pipeline, seen_RPF[row], [items[c].sample.text for c in own_C], told))
        return Result(named(self, {"accuracy": first(torch.stack(judged)), "chance": 1 / self.candidates}))

    def demonstrate(self, pipeline: "Pipeline", image: bytes, home: Path) -> tuple[list[Part], list[bytes]]:
        """The conversation about an image of the caller's behind examples from `dataset`, and all images that it shows.

        Raises DataError for a dataset with too few pairs. A `roomy` pipeline reads it.
        """
        pool = draw_pairs(self, pipeline, home, at_least=self._needed)
        told_RPF = pipeline.inputs.features([item.squares[0] for item in pool])
        (chosen,) = replace(self, support=self.dataset)._choose(pipeline.inputs.features([image]), told_RPF)
        shots = [Shot(self.prompts[0], pool[i].sample.text) for i in chosen]
        shown = [pool[i].sample.images[0] for i in chosen] if self.shots else []
        return prompt(shots, self.prompts[0], shown=bool(self.shots)), [*shown, image]

    def _choose(self, seen_RPF: Tensor, told_RPF: Tensor) -> list[list[int]]:
        """For every row the places of its examples in the support, never its own."""
        count, own = self._needed, range(len(seen_RPF)) if self.support is None else None
        if self.select == "rices" and self.shots:
            return rices(pooled(seen_RPF), pooled(told_RPF), count, own)
        chosen = []
        for row in range(len(seen_RPF)):
            free = [i for i in range(len(told_RPF)) if own is None or i != row]
            chosen.append(random.Random(f"{self.seed}:{row}").sample(free, count))
        return chosen

    def _judge(
        self, pipeline: "Pipeline", seen_PF: Tensor, texts: list[str], told: Mapping[int, tuple[Item, Tensor]]
    ) -> Tensor:
        """(C,) nats of each text about one image, as the mean over the orders of its examples."""
        question, nats = self.prompts[0], []
        for order in orders(list(told), self.orders, self.seed):
            shots = [Shot(question, told[i][0].sample.text) for i in order]
            shown = [told[i][1] for i in order] if self.shots else []
            asked = prompt(shots, question, shown=bool(self.shots))
            said = [[*asked, Part("assistant", text=f" {text}")] for text in texts]
            scores = pipeline.scores(said, [torch.stack([*shown, seen_PF])] * len(texts))
            nats.append(torch.tensor([score.loglik for score in scores]))
        return torch.stack(nats).mean(0)


def roomy(pipeline: "Pipeline") -> "Pipeline":
    """The same model with its whole context to read: many shots are longer than the rows that a stage trains on."""
    stage = pipeline.stage
    return type(pipeline)(pipeline.model, replace(stage, data=replace(stage.data, max_tokens=stage.model.context)))


def prompt(shots: Sequence[Shot], question: str, *, shown: bool = True) -> list[Part]:
    """A conversation that ends where the answer about the last image is due; without `shown`, shots have no image."""
    parts = []
    for image, shot in enumerate(shots):
        parts += [Part("user", image=image)] * shown
        parts += [Part("user", text=shot.question), Part("assistant", text=f" {shot.answer}")]
    return [*parts, Part("user", image=len(shots) if shown else 0), Part("user", text=question)]


def pooled(features_RPF: Tensor) -> Tensor:
    """(R, F) float32 of length 1: the mean of what the vision tower sees."""
    return normalize(features_RPF.float().mean(1), dim=-1)


def rices(queries_RF: Tensor, support_SF: Tensor, count: int, own: Sequence[int] | None = None) -> list[list[int]]:
    """For each query the `count` nearest of the support, the nearest last; `own` is its own place there, if any."""
    alike_RS = queries_RF @ support_SF.T
    if own is not None:
        alike_RS[torch.arange(len(own)), torch.tensor(own)] = -torch.inf
    nearest: list[list[int]] = alike_RS.topk(count, dim=1).indices.flip(1).tolist()
    return nearest


def orders(chosen: Sequence[int], count: int, seed: int = 0) -> list[list[int]]:
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
