"""How a stage reads a sample: the one token stream of its template, and the places of the images in it.

A wiring that asks for an `instruction` reads a second stream beside it: what the user says, in another tokenizer
(InstructBLIP's Q-Former; Dai et al. 2023, arXiv:2305.06500, 2.3).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from transformers import PreTrainedTokenizerBase

from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.data.templates import Segment, prompt, render
from bridgework.data.tiling import layout_of
from bridgework.data.tokens import Encoded, encode, load_tokenizer, tokenise
from bridgework.data.transforms import size_of
from bridgework.errors import DataError, suggest
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
    classes: tuple[str, ...] = ()  # of a wiring that learns a row's labels, and reads no text

    @classmethod
    def of(cls, model: ModelSpec, mixture: Mixture) -> Self:
        """Raises WeightsError where a tokenizer is not to be had."""
        return cls(
            model=model,
            template=mixture.template,
            limit=min(mixture.max_tokens, model.context),
            tokenizer=load_tokenizer(model.tokenizer),
            instructor=None if model.instruction is None else load_tokenizer(model.instruction),
            classes=getattr(model, "classes", ()),
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
        return self._checked(self._encode(segments, layouts, limit or self.limit))

    def answer(self, parts: Sequence[Part], layouts: Sequence[Layout] = ()) -> Encoded:
        """Ids, with labels on the last answer alone: `ask` gives what is before it.

        Raises DataError where all of it does not fit into the context, BadSample as `train` does.
        """
        segments = render(parts, self.template, self.tokenizer)
        first = max(i for i, segment in enumerate(segments) if segment.train)
        while first and segments[first - 1].train:  # its text, and the stop string after it
            first -= 1
        alone = [replace(segment, train=segment.train and i >= first) for i, segment in enumerate(segments)]
        encoded = self._checked(self._encode(alone, layouts, sys.maxsize))
        if len(encoded.ids) > self.model.context:
            said = parts[-1].text or ""
            raise DataError(
                f"the prompt and the answer {said[:40]!r} take {len(encoded.ids)} tokens, and the language model reads "
                f"{self.model.context}; shorten them or use fewer images"
            )
        return encoded

    def _checked(self, encoded: Encoded) -> Encoded:
        if not self.model.image_tokens and len(encoded.images) != 1:
            raise BadSample(
                Reason.PLACEHOLDERS, f"the wiring reads pairs, and the sample shows {len(encoded.images)} images"
            )
        return encoded

    def read(
        self,
        sample: Sample,
        parts: Sequence[Part],
        layouts: Sequence[Layout] = (),
        *,
        choice: int = 0,
        limit: int | None = None,
    ) -> Encoded:
        """What a stage learns of a sample: `train` of its parts, or its label where the wiring has classes."""
        if self.classes:
            return self.label(sample, choice)
        return self.train(parts, layouts, choice=choice, limit=limit)

    def label(self, sample: Sample, choice: int = 0) -> Encoded:
        """The class of a sample as its one id and label; of several labels `choice`, any non-negative draw, picks one.

        Raises BadSample for a sample without exactly one image, without a label, or with one that is no class.
        """
        if len(sample.images) != 1:
            raise BadSample(
                Reason.PLACEHOLDERS, f"a classifier reads one image, and the sample has {len(sample.images)}"
            )
        if not sample.labels:
            raise BadSample(Reason.NO_TARGET, "the stage learns classes, and the sample has no labels")
        name = sample.labels[choice % len(sample.labels)]
        if name not in self.classes:
            near = suggest(name, self.classes)
            near = near if near.endswith("?") else f"; it has {len(self.classes)}"  # a list of all would be long
            raise BadSample(Reason.BAD_ROW, f"the label {name[:80]!r} is none of model.classes{near}")
        place = self.classes.index(name)
        return Encoded([place], [place], [0], [0])

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
