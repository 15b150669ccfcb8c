"""What a model is given: conversations and pictures, laid out exactly as they were in training.

The stage that made the weights decides how a prompt is written and how a picture is cut.
"""

# B batch  T tokens  N images  P patches  F width of the tower's features  S side in pixels

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bridgework.data import templates
from bridgework.data.collate import Batch, Row, collate
from bridgework.data.images import decode, load_image, to_square
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.templates import collapse_videos
from bridgework.data.tiling import tile_image
from bridgework.data.tokenization import Encoded, SampleEncoder
from bridgework.errors import DataError
from bridgework.models.base import eval_no_grad
from bridgework.system import Layout, Stage

ROWS = 16  # samples per forward
_ELSEWHERE = np.zeros((0, 1, 1), np.float16)  # a row's images, which the batch holds as features


@dataclass(frozen=True)
class Seen:
    """One picture as the vision tower saw it. It may be shown in any number of conversations."""

    features: Tensor  # (n, P, F): of its base square and tiles, or of the frames of a video
    layout: Layout | None  # how it is cut; None where every picture is one square


File = bytes | tuple[bytes, ...]  # an image, or a video's frames
Raw = File | Image.Image | NDArray[np.uint8]  # a square comes as an array
Picture = Raw | Seen
Shown = (
    Sequence[Picture] | Tensor
)  # the pictures of one conversation, or features (n, P, F) of one square each


class Example(NamedTuple):
    """One encoded conversation and its pictures."""

    encoded: Encoded
    seen: Sequence[Seen]
    instruction: list[int]  # ids of the second stream, where the wiring reads one


class Inputs:
    """The way into a model; `streams` are its tokens, `prompts` what its stage asks about a pair."""

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        self._model = cast(Any, model)  # a wiring
        self._spec = stage.model
        self.streams = SampleEncoder.of(stage.model, stage.data)
        self.prompts: tuple[str, ...] = next(
            (s.prompts for s in stage.data.leaves if s.prompts), ()
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device

    def features(self, images: Sequence[Raw]) -> Tensor:
        """Return (N, P, F), the vision tower's features of each image as one square; N may be 0.

        Raises BadSample for a file that is not an image.
        """
        return self._features([self._square(image) for image in images])

    def see(self, pictures: Sequence[Picture]) -> list[Seen]:
        """Cut every picture as training does and run the vision tower, once for the squares of all.

        Raises BadSample for a file that is not an image.
        """
        cut = [self._tiles(picture) for picture in pictures if not isinstance(picture, Seen)]
        computed = torch.split(
            self._features([tile for tiles, _ in cut for tile in tiles]), [len(t) for t, _ in cut]
        )
        new = iter(
            [Seen(features, layout) for features, (_, layout) in zip(computed, cut, strict=True)]
        )
        return [picture if isinstance(picture, Seen) else next(new) for picture in pictures]

    def blank(self, like: Sequence[Seen]) -> list[Seen]:
        """Return pictures that show nothing, each cut as the one of `like`: all squares of the tower's mean color."""
        nothing_1PF = self.features([self.mean_square()])
        return [Seen(nothing_1PF.expand(len(seen.features), -1, -1), seen.layout) for seen in like]

    def ask(self, sample: Sample, prompts: Sequence[str] | None = None) -> list[Part]:
        """The sample as a conversation; a pair is asked with the first of `prompts` (default: the stage's own)."""
        asked = templates.conversation(
            sample, self.prompts[:1] if prompts is None else prompts[:1], 0
        )
        return collapse_videos(asked) if self._spec.pixels.video and sample.times_s else asked

    def about(self, question: str | None = None) -> list[Part]:
        """A conversation that asks about one image: `question`, or (None) what the stage's training asked."""
        prompts = None if question is None else (question,)
        return templates.unanswered(self.ask(pair("image", b"", "a caption"), prompts))

    def pictures(self, sample: Sample) -> list[File]:
        """What the conversation of `ask` shows: the sample's images, or its video."""
        return (
            [sample.images] if self._spec.pixels.video and sample.times_s else list(sample.images)
        )

    def layouts(self, sample: Sample) -> list[Layout]:
        """Return how each of `pictures(sample)` is cut, from the sizes alone; [] where each is one square.

        Raises BadSample for a file that is not an image.
        """
        return [
            picture.layout
            for picture in self.streams.pictures(sample)
            if picture.layout is not None
        ]

    def encode(
        self, conversation: Sequence[Part], *, answer: bool, layouts: Sequence[Layout] = ()
    ) -> Encoded:
        """Ids and labels, or (not `answer`) the prompt that ends where the assistant is to speak.

        Both may fill the context, whatever the length of the rows in training. Raises BadSample for a conversation
        without an answer, DataError for a prompt that fills all of the context.
        """
        if not answer:
            return self.streams.ask(conversation, layouts)
        return self.streams.train(conversation, layouts, limit=self._spec.context)

    def batch(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[Shown], *, answer: bool
    ) -> Batch:
        """What the model reads: with answers padded on the right, as prompts on the left.

        Raises DataError where the images are not as many as the conversation shows.
        """
        return self.collate(self.examples(conversations, images, answer=answer), answer=answer)

    def examples(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[Shown], *, answer: bool
    ) -> list[Example]:
        """Every conversation on its own; `collate` makes a batch of some of them."""
        shown = self.look(conversations, images)
        return [
            Example(
                self.encode(c, answer=answer, layouts=_layouts(seen)),
                seen,
                self.streams.instruction(c),
            )
            for c, seen in zip(conversations, shown, strict=True)
        ]

    def answers(
        self, conversation: Sequence[Part], seen: Sequence[Seen], candidates: Sequence[str]
    ) -> list[Example]:
        """One conversation with each candidate as its last answer, which alone has labels; the prompt is shared.

        Raises DataError for a candidate that does not fit after the prompt, BadSample for a blank one.
        """
        instruction, layouts = self.streams.instruction(conversation), _layouts(seen)
        asked = templates.unanswered(conversation)
        answered = [[*asked, Part("assistant", text=candidate)] for candidate in candidates]
        return [
            Example(self.streams.answer(parts, layouts), seen, instruction) for parts in answered
        ]

    def prompt_tokens(self, conversation: Sequence[Part], images: Sequence[Raw]) -> int:
        """Count the tokens of the prompt, images and their tiles included, without the vision tower."""
        layouts = [layout for _, layout in map(self._tiles, images) if layout is not None]
        return len(self.encode(conversation, answer=False, layouts=layouts).ids)

    def collate(self, examples: Sequence[Example], *, answer: bool) -> Batch:
        """Some examples as the model reads them, see `batch`."""
        made = [
            Row(0, i, str(i), 0, example.encoded.ids, example.encoded.labels, _ELSEWHERE,
                layouts=tuple(_layouts(example.seen)), instruction=example.instruction)
            for i, example in enumerate(examples)
        ]  # fmt: skip
        side: Literal["left", "right"] = "right" if answer else "left"
        batch = collate(made, pad_id=self.streams.tokenizer.pad_token_id, side=side).to(self.device)
        return replace(
            batch, features_NPD=self.joined([seen for example in examples for seen in example.seen])
        )

    def joined(self, seen: Sequence[Seen]) -> Tensor:
        """Return (N, P, F), the features of all squares of some pictures, in order; N may be 0."""
        return torch.cat([picture.features for picture in seen]) if seen else self._features([])

    def texts(self, texts: Sequence[str]) -> Batch:
        """Captions, padded on the right and as long as in training, with the places of an image that is not seen."""
        asked = [self.ask(pair("text", b"", text)) for text in texts]
        return self.collate([Example(self.streams.train(c), [], []) for c in asked], answer=True)

    def look(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[Shown]
    ) -> list[list[Seen]]:
        """The pictures of every conversation; those of all go through the vision tower together.

        Raises DataError where the images are not as many as the conversation shows.
        """
        given = [
            self._squares(shown) if isinstance(shown, Tensor) else list(shown) for shown in images
        ]
        for conversation, pictures in zip(conversations, given, strict=True):
            shown = {part.image for part in conversation if part.image is not None}
            if shown != set(range(len(pictures))):
                raise DataError(
                    f"the conversation shows images {sorted(shown)} and {len(pictures)} are given, from 0 on"
                )
        seen = iter(self.see([picture for pictures in given for picture in pictures]))
        return [list(islice(seen, len(pictures))) for pictures in given]

    def mean_square(self) -> NDArray[np.uint8]:
        """uint8 (3, S, S) of the tower's mean color: an image that shows nothing."""
        pixels = self._spec.pixels
        color_3 = np.array([round(255 * mean) for mean in pixels.mean], np.uint8)
        return np.broadcast_to(color_3[:, None, None], (3, pixels.size, pixels.size))

    def _square(self, image: Raw) -> NDArray[np.uint8]:
        """uint8 (3, S, S) as the tower reads it. Raises BadSample for what is no image."""
        if isinstance(image, np.ndarray):
            return image
        pixels = self._spec.pixels
        if isinstance(image, tuple):
            raise DataError("a video is read where a conversation shows it; give one of its frames")
        return load_image(image, pixels) if isinstance(image, bytes) else to_square(image, pixels)

    def _features(self, squares: Sequence[NDArray[np.uint8]]) -> Tensor:
        with eval_no_grad(self._model):
            some = (
                torch.from_numpy(np.stack(squares[i : i + ROWS]))
                for i in range(0, len(squares), ROWS)
            )
            seen = [self._model.vision(pixels_NHW.to(self.device)) for pixels_NHW in some]
            tower = self._model.vision.config
            return (
                torch.cat(seen)
                if seen
                else torch.zeros(0, tower.tokens, tower.feature_width, device=self.device)
            )

    def _squares(self, features_nPF: Tensor) -> list[Picture]:
        return [Seen(features_1PF, self._still()) for features_1PF in features_nPF.split(1)]

    def _still(self) -> Layout | None:
        """The layout of one square; None where the wiring reads nothing else."""
        pixels = self._spec.pixels
        return Layout(0, 0, pixels.size, pixels.size) if pixels.video or pixels.grids else None

    def _tiles(self, picture: Raw) -> tuple[NDArray[np.uint8], Layout | None]:
        pixels = self._spec.pixels
        if isinstance(picture, tuple):
            frames = np.stack([load_image(frame, pixels) for frame in picture])
            return frames, Layout(1, len(frames) - 1, pixels.size, pixels.size)
        if not pixels.grids or isinstance(picture, np.ndarray):
            return self._square(picture)[None], self._still()
        return tile_image(decode(picture) if isinstance(picture, bytes) else picture, pixels)


def _layouts(seen: Sequence[Seen]) -> list[Layout]:
    return [picture.layout for picture in seen if picture.layout is not None]
