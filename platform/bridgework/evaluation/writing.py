"""What a model writes when an evaluation asks it: the same on every rank, and without dropout while it trains."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import SpecError
from bridgework.spec import spec

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

    def __post_init__(self) -> None:
        if self.beams < 1 or not (self.top_p is None or 0 < self.top_p <= 1) or not 0 <= self.least <= self.most:
            raise SpecError(
                "writing: beams is at least 1, top_p in (0, 1] and least at most most; "
                f"got {self.beams}, {self.top_p}, {self.least} and {self.most}"
            )

    def tiny(self) -> "Writing":
        return replace(self, beams=min(self.beams, 2), least=min(self.least, 1), most=min(self.most, 4))

    def run(self, pipeline: "Pipeline", asked: Sequence[Sequence[Part]], shown: Any, seed: int = 0) -> list[str]:
        """An answer to each conversation about its images `shown[i]`; what is drawn depends on the row and `seed`."""
        how: dict[str, Any] = {"min_new_tokens": self.least, "max_new_tokens": self.most}
        if self.top_p is not None:
            how |= {"temperature": 1.0, "top_p": self.top_p}
        texts: list[str] = []
        with _resting(pipeline.model):
            if self.top_p is None and self.beams > 1:  # a beam search holds one prompt at a time
                how |= {"beams": self.beams}
                rows = zip(asked, shown, strict=True)
                return [pipeline.generate(conversation, images, **how).text for conversation, images in rows]
            for start in range(0, len(asked), ROWS):
                part = slice(start, start + ROWS)
                seeds = [seed * 1_000_003 + row for row in range(len(asked))[part]]
                texts += pipeline.write(asked[part], shown[part], seeds, **how)
        return texts


def question_of(pipeline: "Pipeline", sample: Sample, prompts: Sequence[str] | None) -> list[Part]:
    """The sample as a conversation that ends where its last answer is due."""
    parts = pipeline.inputs.ask(sample, prompts)
    while parts and parts[-1].text is not None and parts[-1].role in ("caption", "assistant"):
        parts.pop()
    return parts


def about_image(pipeline: "Pipeline", prompts: Sequence[str] | None) -> list[Part]:
    """A conversation that asks for a caption of one image, as the stage's training asked (or with `prompts`)."""
    return question_of(pipeline, pair("image", b"", "a caption"), prompts)


@contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
