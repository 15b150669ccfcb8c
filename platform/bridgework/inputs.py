"""What a model is given: conversations and pictures, laid out exactly as they were in training.

The stage that made the weights decides how a prompt is written and how a picture is cut.
"""

# B batch  T tokens  N images  P patches  F width of the tower's features  S side in pixels

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bridgework.data import templates
from bridgework.data.batch import Batch, Row, collate
from bridgework.data.documents import whole_videos
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.streams import Streams
from bridgework.data.tiling import lay_out
from bridgework.data.tokens import Encoded
from bridgework.data.transforms import decode, read_square, to_square
from bridgework.errors import DataError
from bridgework.system import Layout, Stage

Picture = bytes | Image.Image | NDArray[np.uint8] | tuple[bytes, ...]  # a file, a picture, a square; a video's frames
Shown = Sequence[Picture] | Tensor  # what one conversation shows: pictures, or their features (n, P, F)
ROWS = 16  # samples per forward
_ELSEWHERE = np.zeros((0, 1, 1), np.float16)  # a row's images, which the batch holds as features


class Seen(NamedTuple):
    """The images of one conversation: features of all their tiles (n, P, F), and how each image was cut, if any is."""

    features: Tensor
    layouts: list[Layout]


class Example(NamedTuple):
    """One conversation, encoded, beside what it shows."""

    encoded: Encoded
    seen: Seen
    instruction: list[int]  # ids of the second stream, where the wiring reads one


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """No gradient, no dropout; the mode is put back behind it."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            model.train()


class Inputs:
    """The way into a model; `streams` are its tokens, `prompts` what its stage asks about a pair."""

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        self._model = cast(Any, model)  # a wiring
        self._spec = stage.model
        self.streams = Streams.of(stage.model, stage.data)
        self.prompts: tuple[str, ...] = next((s.prompts for s in stage.data.leaves if s.prompts), ())

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device

    def features(self, images: Sequence[Picture]) -> Tensor:
        """(N, P, F): what the vision tower sees, for all that takes images here; N may be 0.

        Raises BadSample for a file that is not an image.
        """
        return self._features([self._square(image) for image in images])

    def ask(self, sample: Sample, prompts: Sequence[str] | None = None) -> list[Part]:
        """The sample as a conversation; a pair is asked with the first of `prompts` (default: the stage's own)."""
        asked = templates.conversation(sample, self.prompts[:1] if prompts is None else prompts[:1], 0)
        return whole_videos(asked) if self._spec.pixels.video and sample.times_s else asked

    def pictures(self, sample: Sample) -> list[Picture]:
        """What the conversation of `ask` shows: the sample's images, or its video."""
        return [sample.images] if self._spec.pixels.video and sample.times_s else list(sample.images)

    def encode(self, conversation: Sequence[Part], *, answer: bool, layouts: Sequence[Layout] = ()) -> Encoded:
        """Ids and labels as in training, or (not `answer`) the prompt that ends where the assistant is to speak.

        Raises BadSample for a conversation without an answer, DataError for a prompt that fills the whole context.
        """
        return self.streams.train(conversation, layouts) if answer else self.streams.ask(conversation, layouts)

    def batch(self, conversations: Sequence[Sequence[Part]], images: Sequence[Shown], *, answer: bool) -> Batch:
        """What the model reads: with answers padded on the right, as prompts on the left.

        Raises DataError where the images are not as many as the conversation shows.
        """
        return self.collate(self.examples(conversations, images, answer=answer), answer=answer)

    def examples(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[Shown], *, answer: bool
    ) -> list[Example]:
        """Every conversation on its own; `collate` makes a batch of some of them."""
        return self._encoded(conversations, self.see(conversations, images), answer=answer)

    def collate(self, examples: Sequence[Example], *, answer: bool) -> Batch:
        """Some examples as the model reads them, see `batch`."""
        made = [
            Row(0, i, str(i), 0, example.encoded.ids, example.encoded.labels, _ELSEWHERE,
                layouts=tuple(example.seen.layouts), instruction=example.instruction)
            for i, example in enumerate(examples)
        ]  # fmt: skip
        side: Literal["left", "right"] = "right" if answer else "left"
        batch = collate(made, pad_id=self.streams.tokenizer.pad_token_id, side=side).to(self.device)
        return replace(batch, features_NPD=torch.cat([example.seen.features for example in examples]))

    def texts(self, texts: Sequence[str]) -> Batch:
        """Captions, padded on the right, each with the places of an image that is not looked at."""
        asked = [self.ask(pair("text", b"", text)) for text in texts]
        nothing = Seen(torch.zeros(0, 1, 1), [])
        return self.collate(self._encoded(asked, [nothing] * len(asked), answer=True), answer=True)

    def see(self, conversations: Sequence[Sequence[Part]], images: Sequence[Shown]) -> list[Seen]:
        """What every conversation shows; the pictures of all go through the tower together."""
        for conversation, given in zip(conversations, images, strict=True):
            shown = {part.image for part in conversation if part.image is not None}
            if shown != set(range(len(given))):
                raise DataError(f"the conversation shows images {sorted(shown)} and {len(given)} are given, from 0 on")
        cut = [[] if isinstance(given, Tensor) else [self._tiles(picture) for picture in given] for given in images]
        counts = [sum(len(tiles) for tiles, _ in pictures) for pictures in cut]
        squares = [tile for pictures in cut for tiles, _ in pictures for tile in tiles]
        computed = torch.split(self._features(squares), counts)
        return [
            Seen(given, self._still(len(given)))
            if isinstance(given, Tensor)
            else Seen(features, [layout for _, layout in pictures if layout])
            for given, features, pictures in zip(images, computed, cut, strict=True)
        ]

    def mean_square(self) -> NDArray[np.uint8]:
        """uint8 (3, S, S) of the tower's mean colour: an image that shows nothing."""
        pixels = self._spec.pixels
        colour_3 = np.array([round(255 * mean) for mean in pixels.mean], np.uint8)
        return np.broadcast_to(colour_3[:, None, None], (3, pixels.size, pixels.size))

    def _square(self, image: Picture) -> NDArray[np.uint8]:
        """uint8 (3, S, S) as the tower reads it. Raises BadSample for what is no image."""
        if isinstance(image, np.ndarray):
            return image
        pixels = self._spec.pixels
        if isinstance(image, tuple):
            raise DataError("a video is read where a conversation shows it; give one of its frames")
        return read_square(image, pixels) if isinstance(image, bytes) else to_square(image, pixels)

    def _features(self, squares: Sequence[NDArray[np.uint8]]) -> Tensor:
        with resting(self._model):
            some = (torch.from_numpy(np.stack(squares[i : i + ROWS])) for i in range(0, len(squares), ROWS))
            seen = [self._model.vision(pixels_NHW.to(self.device)) for pixels_NHW in some]
            tower = self._model.vision.config
            return torch.cat(seen) if seen else torch.zeros(0, tower.tokens, tower.feature_width, device=self.device)

    def _still(self, images: int) -> list[Layout]:
        """The layouts of images of one square: none, but beside videos."""
        pixels = self._spec.pixels
        return [Layout(0, 0, pixels.size, pixels.size)] * images if pixels.video else []

    def _tiles(self, picture: Picture) -> tuple[NDArray[np.uint8], Layout | None]:
        pixels = self._spec.pixels
        if isinstance(picture, tuple):
            frames = np.stack([read_square(frame, pixels) for frame in picture])
            return frames, Layout(1, len(frames) - 1, pixels.size, pixels.size)
        if not pixels.grids or isinstance(picture, np.ndarray):
            return self._square(picture)[None], next(iter(self._still(1)), None)
        return lay_out(decode(picture) if isinstance(picture, bytes) else picture, pixels)

    def _encoded(self, conversations: Sequence[Sequence[Part]], seen: Sequence[Seen], *, answer: bool) -> list[Example]:
        return [
            Example(self.encode(c, answer=answer, layouts=s.layouts), s, self.streams.instruction(c))
            for c, s in zip(conversations, seen, strict=True)
        ]
