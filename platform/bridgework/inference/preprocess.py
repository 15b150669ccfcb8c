"""Preprocessing for inference: conversations and images become model inputs exactly as in training.

The stage of the weights defines the prompt template and how an image is tiled.
"""

# B batch  T tokens  N squares of images  P patches  F width of the tower's features
# S side in pixels  n squares of one image

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bridgework.data import templates
from bridgework.data.collate import Batch, Row, collate
from bridgework.data.images import decode, load_image, size_of, to_square
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.templates import collapse_videos
from bridgework.data.tiling import choose_grid, tile_image
from bridgework.data.tokenization import Encoded, SampleEncoder
from bridgework.errors import DataError
from bridgework.models.base import eval_no_grad
from bridgework.system import Layout, Pixels, Stage

ROWS = 16  # samples per forward
_NO_PIXELS = np.zeros((0, 1, 1), np.float16)  # rows have no pixels: the batch holds features


@dataclass(frozen=True)
class EncodedImage:
    """Vision features of one image. It may be shown in any number of conversations."""

    features: Tensor  # (n, P, F): of its base square and tiles, or of the frames of a video
    layout: Layout | None  # its grid of tiles; None if every image is one square


ImageFile = bytes | tuple[bytes, ...]  # an image, or a video's frames
RawImage = ImageFile | Image.Image | NDArray[np.uint8]  # an array is a square, (3, S, S)
ImageInput = RawImage | EncodedImage
# images of one conversation, or features (n, P, F) of one square each
ConversationImages = Sequence[ImageInput] | Tensor
ImageSource = str | os.PathLike[str] | BinaryIO | bytes | Image.Image  # no URL


class TiledImage(NamedTuple):
    """Squares of one image, as the vision tower reads them."""

    squares: NDArray[np.uint8]  # (n, 3, S, S)
    layout: Layout | None  # as in `EncodedImage`


class EncodedExample(NamedTuple):
    """One encoded conversation and its images."""

    encoded: Encoded
    images: Sequence[EncodedImage]
    instruction: list[int]  # ids of the instruction stream; [] if the wiring reads none


def check_images(conversation: Sequence[Part], given: int) -> None:
    """Raise DataError if a conversation does not show exactly the `given` images."""
    numbers = {part.image for part in conversation if part.image is not None}
    if numbers != set(range(given)):
        raise DataError(
            f"the conversation shows images {sorted(numbers)}, counted from 0. "
            f"Got {given} images; expected as many as it shows. "
            "Fix: pass each image that it shows"
        )


def read_image(source: ImageSource) -> bytes | Image.Image:
    """Return a PIL image as it is, and any other source as the bytes of an image file.

    The content is not decoded here. Raises DataError for a path that cannot be read.
    """
    if isinstance(source, bytes | Image.Image):
        return source
    return read_file(source) if isinstance(source, str | os.PathLike) else source.read()


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a local file. Raises DataError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}). Expected an image file. "
            "Fix: give its local path; download a URL first"
        ) from None


class Inputs:
    """Builder of model inputs.

    `streams` encodes conversations; `prompts` are the questions with which the stage asks about a
    pair.
    """

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        self._model = cast(Any, model)  # a wiring
        self._spec = stage.model
        self.streams = SampleEncoder.of(stage.model, stage.data)
        prompts = (source.prompts for source in stage.data.leaves if source.prompts)
        self.prompts: tuple[str, ...] = next(prompts, ())

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device

    @property
    def pixels(self) -> Pixels:
        """Preprocessing of an image."""
        return self._spec.pixels

    def features(self, images: Sequence[RawImage]) -> Tensor:
        """Return (N, P, F) features of the vision tower, each image as one square; N may be 0.

        Raises BadSample for a file that is not an image, DataError for a video.
        """
        return self._features([self._square(image) for image in images])

    def encode_images(self, images: Sequence[ImageInput]) -> list[EncodedImage]:
        """Tile every image as in training, and encode the squares of all images together.

        An image that is already encoded is returned as it is. Raises BadSample for a file that is
        not an image.
        """
        tiled = [self.tiles(image) for image in images if not isinstance(image, EncodedImage)]
        new = iter(self.encode_tiles(tiled))
        return [image if isinstance(image, EncodedImage) else next(new) for image in images]

    def encode_tiles(self, tiled: Sequence[TiledImage]) -> list[EncodedImage]:
        """Encode the squares of all images together."""
        features = torch.split(
            self._features([square for image in tiled for square in image.squares]),
            [len(image.squares) for image in tiled],
        )
        return [
            EncodedImage(of_one, image.layout)
            for of_one, image in zip(features, tiled, strict=True)
        ]

    def blank_images(self, like: Sequence[EncodedImage]) -> list[EncodedImage]:
        """Return images of the tower's mean color with the layouts of `like`."""
        blank_1PF = self.features([self.mean_square()])
        return [
            EncodedImage(blank_1PF.expand(len(image.features), -1, -1), image.layout)
            for image in like
        ]

    def ask(self, sample: Sample, prompts: Sequence[str] | None = None) -> list[Part]:
        """Return the sample as a conversation.

        A pair is asked with the first of `prompts` (default: the stage's).
        """
        asked = templates.conversation(
            sample, self.prompts[:1] if prompts is None else prompts[:1], 0
        )
        return collapse_videos(asked) if self._spec.pixels.video and sample.times_s else asked

    def about(self, question: str | None = None) -> list[Part]:
        """Return a conversation that asks `question` about one image (default: as in training)."""
        prompts = None if question is None else (question,)
        return templates.unanswered(self.ask(pair("image", b"", "a caption"), prompts))

    def question(self, question: str = "", images: int = 1) -> list[Part]:
        """Return a conversation that shows `images` images and then asks `question`.

        Without a question, one image is asked about as in the stage's training, see `about`. Raises
        DataError if there is no question, and not exactly one image.
        """
        if question:
            shown = [Part("user", image=image) for image in range(images)]
            return [*shown, Part("user", text="\n" * bool(images) + question)]
        if images != 1:
            raise DataError(
                f"ask: there is nothing to ask. Got no question and {images} images; expected a "
                "question, or exactly one image. Fix: give a question, or one image to describe"
            )
        return self.about()

    def pictures(self, sample: Sample) -> list[ImageFile]:
        """Return the images in the conversation of `ask`: the sample's images, or its video."""
        return (
            [sample.images] if self._spec.pixels.video and sample.times_s else list(sample.images)
        )

    def layouts(self, sample: Sample) -> list[Layout]:
        """Return the layout of each of `pictures(sample)`, from the sizes alone.

        [] if each is one square.
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
        """Return ids and labels.

        With `answer=False`, the prompt up to the position of the next answer. Both may fill the
        context, also if the rows in training were shorter. Raises BadSample for a conversation
        without an answer, DataError for a prompt that fills the context.
        """
        if not answer:
            return self.streams.ask(conversation, layouts)
        return self.streams.train(conversation, layouts, limit=self._spec.context)

    def batch(
        self,
        conversations: Sequence[Sequence[Part]],
        images: Sequence[ConversationImages],
        *,
        answer: bool,
    ) -> Batch:
        """Return the input batch, padded on the right with answers and on the left for prompts.

        Raises DataError if a conversation does not show exactly the given images.
        """
        return self.collate(self.examples(conversations, images, answer=answer), answer=answer)

    def examples(
        self,
        conversations: Sequence[Sequence[Part]],
        images: Sequence[ConversationImages],
        *,
        answer: bool,
    ) -> list[EncodedExample]:
        """Return every conversation encoded on its own; `collate` combines them into a batch."""
        encoded = self.encode_conversation_images(conversations, images)
        return [
            EncodedExample(
                self.encode(c, answer=answer, layouts=_layouts(shown)),
                shown,
                self.streams.instruction(c),
            )
            for c, shown in zip(conversations, encoded, strict=True)
        ]

    def answers(
        self,
        conversation: Sequence[Part],
        images: Sequence[EncodedImage],
        candidates: Sequence[str],
    ) -> list[EncodedExample]:
        """Return the conversation with each candidate as its last answer.

        Only that answer has labels. Raises DataError for a candidate that does not fit after the
        prompt, BadSample for a blank one.
        """
        instruction, layouts = self.streams.instruction(conversation), _layouts(images)
        prompt = templates.unanswered(conversation)
        answered = [[*prompt, Part("assistant", text=candidate)] for candidate in candidates]
        return [
            EncodedExample(self.streams.answer(parts, layouts), images, instruction)
            for parts in answered
        ]

    def prompt_tokens(self, conversation: Sequence[Part], images: Sequence[RawImage]) -> int:
        """Count the tokens of the prompt, images and tiles included, without the vision tower."""
        layouts = [layout for layout in map(self.layout, images) if layout is not None]
        return len(self.encode(conversation, answer=False, layouts=layouts).ids)

    def collate(self, examples: Sequence[EncodedExample], *, answer: bool) -> Batch:
        """Return the input batch of encoded examples, see `batch`."""
        rows = [
            Row(0, i, str(i), 0, example.encoded.ids, example.encoded.labels, _NO_PIXELS,
                layouts=tuple(_layouts(example.images)), instruction=example.instruction)
            for i, example in enumerate(examples)
        ]  # fmt: skip
        side: Literal["left", "right"] = "right" if answer else "left"
        batch = collate(rows, pad_id=self.streams.tokenizer.pad_token_id, side=side).to(self.device)
        images = [image for example in examples for image in example.images]
        return replace(batch, features_NPD=self.concat_features(images))

    def concat_features(self, images: Sequence[EncodedImage]) -> Tensor:
        """Return (N, P, F) features of all squares of the images, in order; N may be 0."""
        return torch.cat([image.features for image in images]) if images else self._features([])

    def texts(self, texts: Sequence[str]) -> Batch:
        """Return captions as a batch, padded on the right and truncated as in training.

        The positions of the image are kept, but the batch has no image.
        """
        conversations = [self.ask(pair("text", b"", text)) for text in texts]
        examples = [EncodedExample(self.streams.train(c), [], []) for c in conversations]
        return self.collate(examples, answer=True)

    def encode_conversation_images(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[ConversationImages]
    ) -> list[list[EncodedImage]]:
        """Return the encoded images of every conversation.

        All go through the vision tower together.
        Raises DataError if a conversation does not show exactly the given images.
        """
        given = [
            self._squares(shown) if isinstance(shown, Tensor) else list(shown) for shown in images
        ]
        for conversation, of_one in zip(conversations, given, strict=True):
            check_images(conversation, len(of_one))
        encoded = iter(self.encode_images([image for of_one in given for image in of_one]))
        return [list(islice(encoded, len(of_one))) for of_one in given]

    def mean_square(self) -> NDArray[np.uint8]:
        """Return a uint8 square (3, S, S) of the tower's mean color: a blank image."""
        pixels = self._spec.pixels
        color_3 = np.array([round(255 * mean) for mean in pixels.mean], np.uint8)
        return np.broadcast_to(color_3[:, None, None], (3, pixels.size, pixels.size))

    def _square(self, image: RawImage) -> NDArray[np.uint8]:
        """Return uint8 (3, S, S).

        Raises BadSample for a file that is not an image, DataError for a video.
        """
        if isinstance(image, np.ndarray):
            return image
        pixels = self._spec.pixels
        if isinstance(image, tuple):
            raise DataError(
                "a video cannot be read as one square. "
                "Fix: show it in a conversation, or give one of its frames"
            )
        return load_image(image, pixels) if isinstance(image, bytes) else to_square(image, pixels)

    def _features(self, squares: Sequence[NDArray[np.uint8]]) -> Tensor:
        with eval_no_grad(self._model):
            if not squares:
                tower = self._model.vision.config
                return torch.zeros(0, tower.tokens, tower.feature_width, device=self.device)
            batches = (
                torch.from_numpy(np.stack(squares[i : i + ROWS]))
                for i in range(0, len(squares), ROWS)
            )
            return torch.cat([self._model.vision(b_N3SS.to(self.device)) for b_N3SS in batches])

    def _squares(self, features_nPF: Tensor) -> list[ImageInput]:
        layout = self._one_square()
        return [EncodedImage(features_1PF, layout) for features_1PF in features_nPF.split(1)]

    def _one_square(self) -> Layout | None:
        """Return the layout of one square; None if the wiring reads neither tiles nor videos."""
        pixels = self._spec.pixels
        return Layout(0, 0, pixels.size, pixels.size) if pixels.video or pixels.grids else None

    def tiles(self, image: RawImage) -> TiledImage:
        """Return the squares that the vision tower reads of an image, decoded and resized.

        Raises BadSample for a file that is not an image.
        """
        pixels = self._spec.pixels
        if isinstance(image, tuple):
            frames = np.stack([load_image(frame, pixels) for frame in image])
            return TiledImage(frames, self.layout(image))
        if not pixels.grids or isinstance(image, np.ndarray):
            return TiledImage(self._square(image)[None], self._one_square())
        return TiledImage(*tile_image(decode(image) if isinstance(image, bytes) else image, pixels))

    def layout(self, image: RawImage) -> Layout | None:
        """Return the layout of `tiles` from the size of the image alone.

        Raises BadSample for a file that is not an image.
        """
        pixels = self._spec.pixels
        if isinstance(image, tuple):
            return Layout(1, len(image) - 1, pixels.size, pixels.size)
        if not pixels.grids or isinstance(image, np.ndarray):
            return self._one_square()
        return choose_grid(*(size_of(image) if isinstance(image, bytes) else image.size), pixels)


class RememberingInputs(Inputs):
    """Inputs that remember the features of a frozen tower by their pixels, without a limit."""

    def __init__(self, model: Any, stage: Stage) -> None:
        super().__init__(model, stage)
        self._known = dict[bytes, Tensor]()

    def _features(self, squares: Sequence[NDArray[np.uint8]]) -> Tensor:
        keys = [
            hashlib.sha256(np.ascontiguousarray(square).tobytes()).digest() for square in squares
        ]
        missing = {k: s for k, s in zip(keys, squares, strict=True) if k not in self._known}
        if missing or not squares:
            computed = super()._features(list(missing.values()))
            if not squares:
                return computed
            self._known |= dict(zip(missing, computed, strict=True))
        return torch.stack([self._known[key] for key in keys])


def _layouts(images: Sequence[EncodedImage]) -> list[Layout]:
    return [image.layout for image in images if image.layout is not None]
