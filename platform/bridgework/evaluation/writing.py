"""What a model writes when an evaluation asks it: the same on every rank, and without dropout while it trains."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from torch import nn

from bridgework.data.samples import Part, Sample
from bridgework.data.templates import unanswered
from bridgework.errors import SpecError
from bridgework.spec import added, spec

if TYPE_CHECKING:
    from bridgework.inference import Pipeline

ROWS = 16  # written side by side


@spec
class Writing:
    """By beam search, greedily (`beams=1`), or drawn from the likeliest tokens that have `top_p` of the probability."""

    beams: int = 3
    top_p: float | None = None  # nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751); beams are then none
    least: int = 1  # tokens
    most: int = 20
    length_penalty: float = added(default=1.0)  # of beams: below 0 prefers short answers
    repetition_penalty: float = added(default=1.0)  # above 1: what was written before gets less likely

    def __post_init__(self) -> None:
        if self.beams < 1 or not (self.top_p is None or 0 < self.top_p <= 1) or not 0 <= self.least <= self.most:
            raise SpecError(
                "writing: beams is at least 1, top_p in (0, 1] and least at most most; "
                f"got {self.beams}, {self.top_p}, {self.least} and {self.most}"
            )
        if not (isfinite(self.length_penalty) and 0 < self.repetition_penalty < inf):
            raise SpecError(
                "writing: length_penalty is a finite number and repetition_penalty is above 0; "
                f"got {self.length_penalty:g} and {self.repetition_penalty:g}"
            )
        if self.length_penalty != 1 and (self.beams == 1 or self.top_p is not None):
            raise SpecError(
                f"writing.length_penalty {self.length_penalty:g} ranks the beams of a search; set writing.beams above 1"
            )

    def tiny(self) -> "Writing":
        return replace(self, beams=min(self.beams, 2), least=min(self.least, 1), most=min(self.most, 4))

    def run(self, pipeline: "Pipeline", asked: Sequence[Sequence[Part]], shown: Any, seed: int = 0) -> list[str]:
        """An answer to each conversation about its images `shown[i]`; what is drawn depends on the row and `seed`."""
        how: dict[str, Any] = {"min_new_tokens": self.least, "max_new_tokens": self.most,
                               "repetition_penalty": self.repetition_penalty}  # fmt: skip
        if self.top_p is not None:
            how |= {"temperature": 1.0, "top_p": self.top_p}
        texts: list[str] = []
        with _resting(pipeline.model):
            if self.top_p is None and self.beams > 1:  # a beam search holds one prompt at a time
                how |= {"beams": self.beams, "length_penalty": self.length_penalty}
                rows = zip(asked, shown, strict=True)
                return [pipeline.generate(conversation, images, **how).text for conversation, images in rows]
            for start in range(0, len(asked), ROWS):
                part = slice(start, start + ROWS)
                seeds = [seed * 1_000_003 + row for row in range(len(asked))[part]]
                texts += pipeline.write(asked[part], shown[part], seeds, **how)
        return texts


def question_of(pipeline: "Pipeline", sample: Sample, prompts: Sequence[str] | None) -> list[Part]:
    """The sample as a conversation that ends where its last answer is due."""
    return unanswered(pipeline.inputs.ask(sample, prompts))


def about_image(pipeline: "Pipeline", prompts: Sequence[str] | None) -> list[Part]:
    """A conversation that asks for a caption of one image, as the stage's training asked (or with `prompts`)."""
    return pipeline.inputs.about(prompts[0] if prompts else None)


@contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
