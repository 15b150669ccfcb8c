"""How a stage reads a sample: the one token stream of its template, and the places of the images in it.

A wiring that asks for an `instruction` reads a second stream beside it: what the user says, in another tokenizer
(InstructBLIP's Q-Former; Dai et al. 2023, arXiv:2305.06500, 2.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from transformers import PreTrainedTokenizerBase

from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.data.templates import Segment, prompt, render
from bridgework.data.tiling import layout_of
from bridgework.data.tokens import Encoded, encode, load_tokenizer, tokenise
from bridgework.data.transforms import size_of
from bridgework.system import Layout, Mixture, ModelSpec

INSTRUCTION_TOKENS = 128  # InstructBLIP's limit for the Q-Former; of what is longer the end stays


class Picture(NamedTuple):
    """One image place of a sample: an image, or a video, which is its frames."""

    files: tuple[int, ...]  # of the sample's images
    layout: Layout | None  # where the wiring reads pictures of several squares


@dataclass(frozen=True)
class Streams:
    """The tokenizers and the template of one stage."""

    model: ModelSpec
    template: str
    limit: int  # tokens of a row to train on
    tokenizer: PreTrainedTokenizerBase
    instructor: PreTrainedTokenizerBase | None

    @classmethod
    def of(cls, model: ModelSpec, mixture: Mixture) -> Self:
        """Raises WeightsError where a tokenizer is not to be had."""
        return cls(
            model=model,
            template=mixture.template,
            limit=min(mixture.max_tokens, model.context),
            tokenizer=load_tokenizer(model.tokenizer),
            instructor=None if model.instruction is None else load_tokenizer(model.instruction),
        )

    def pictures(self, sample: Sample) -> list[Picture]:
        """What the sample shows: its images, or a video whole. Raises BadSample for a file that is no image."""
        pixels, files = self.model.pixels, sample.images
        if pixels.video and sample.times_s:
            return [Picture(tuple(range(len(files))), Layout(1, len(files) - 1, *size_of(files[0])))]
        laid = bool(pixels.grids) or pixels.video
        return [Picture((i,), layout_of(*size_of(file), pixels) if laid else None) for i, file in enumerate(files)]

    def train(
        self, parts: Sequence[Part], layouts: Sequence[Layout] = (), *, choice: int = 0, limit: int | None = None
    ) -> Encoded:
        """Ids and labels to learn from. `layouts` says how each picture is cut; without any, each is one square.

        Raises BadSample for a sample without an answer, or without its one image where the wiring is for pairs.
        """
        segments = render(parts, self.template, self.tokenizer, choice)
        encoded = self._encode(segments, layouts, limit or self.limit)
        if not self.model.image_tokens and len(encoded.images) != 1:
            raise BadSample(
                Reason.PLACEHOLDERS, f"the wiring reads pairs, and the sample shows {len(encoded.images)} images"
            )
        return encoded

    def ask(self, parts: Sequence[Part], layouts: Sequence[Layout] = ()) -> Encoded:
        """The prompt that ends where the assistant is to speak. Raises DataError where it fills the context."""
        return self._encode(prompt(parts, self.template, self.tokenizer), layouts, self.model.context - 1)

    def instruction(self, parts: Sequence[Part]) -> list[int]:
        """The ids of the second stream; empty where the wiring has none."""
        tokenizer = self.instructor
        if tokenizer is None:
            return []
        said = " ".join(part.text.strip() for part in parts if part.role == "user" and part.text is not None)
        ids = tokenise(said, tokenizer, literal=True)[-(INSTRUCTION_TOKENS - 2) :]
        first = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        last = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return [token for token in (first, *ids, last) if token is not None]

    def _encode(self, segments: Sequence[Segment], layouts: Sequence[Layout], limit: int) -> Encoded:
        places: int | list[int] = [self.model.places(layout) for layout in layouts] or self.model.image_tokens
        return encode(segments, self.tokenizer, image_tokens=places, max_tokens=limit)
