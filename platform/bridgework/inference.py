"""One interface to a trained model, for evaluation, for the command line and for serving.

Answers are judged (`scores`, `loglik`, `rank`), written (`generate`, `stream`) and embedded. The stage that made the
weights decides how a prompt is written: what comes in here is laid out exactly as it was in training.
"""

# B batch  T tokens  N images  P patches  F width of the tower's features  C candidates  D width  S side in pixels

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bridgework.data import templates
from bridgework.data.batch import Batch, Row, collate, padded
from bridgework.data.documents import whole_videos
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.streams import Streams
from bridgework.data.tiling import lay_out
from bridgework.data.tokens import Encoded
from bridgework.data.transforms import decode, read_square, to_square
from bridgework.errors import DataError, SpecError
from bridgework.generation import Endings, FinishReason, Sampling, Stream, together
from bridgework.system import IGNORE, Layout, Stage
from bridgework.training import artefact

Picture = bytes | Image.Image | NDArray[np.uint8] | tuple[bytes, ...]  # a file, a picture, a square; a video's frames
ROWS = 16  # samples per forward
_ELSEWHERE = np.zeros((0, 1, 1), np.float16)  # a row's images, which the batch holds as features


class _Seen(NamedTuple):
    """The images of one conversation: features of all their tiles (n, P, F), and how each image was cut, if any is."""

    features: Tensor
    layouts: list[Layout]


class _Row(NamedTuple):
    encoded: Encoded
    seen: _Seen
    instruction: list[int]


class Score(NamedTuple):
    """What a model thinks of one answer."""

    loglik: float  # nats, summed over the tokens with loss
    tokens: int


class Ranked(NamedTuple):
    """A candidate, and by how many nats the image makes it likelier than it is anyway."""

    candidate: str
    score: float


@dataclass(frozen=True)
class Generation:
    """A written answer and what it took."""

    text: str
    prompt_tokens: int  # images included
    completion_tokens: int  # with the token that ended it
    finish_reason: FinishReason


class Pipeline:
    """A model and the stage that says how it is spoken to. The model may still be training: modes are put back."""

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        self.model = cast(Any, model)  # a wiring; what each of them can, `_able` says
        self.stage = stage
        self.streams = Streams.of(stage.model, stage.data)
        self.tokenizer = self.streams.tokenizer
        self.prompts: tuple[str, ...] = next((s.prompts for s in stage.data.leaves if s.prompts), ())
        self._endings = Endings.of(self.streams, getattr(model, "endings", frozenset()))

    @classmethod
    def load(cls, path: str, device: str | None = None) -> "Pipeline":
        """The weights artefact under `path`, on a GPU if there is one; there in the precision of its training."""
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = artefact.load(path, place)
        half = place.type == "cuda" and loaded.stage.shard.precision == "bf16"
        return cls(loaded.model.to(torch.bfloat16) if half else loaded.model, loaded.stage)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    # --- in ----------------------------------------------------------------------------------------------------------

    def features(self, images: Sequence[Picture]) -> Tensor:
        """(N, P, F): what the vision tower sees, for all that takes images here; N may be 0.

        Raises BadSample for a file that is not an image.
        """
        return self._features([self._square(image) for image in images])

    def ask(self, sample: Sample, prompts: Sequence[str] | None = None) -> list[Part]:
        """The sample as a conversation; a pair is asked with the first of `prompts` (default: the stage's own)."""
        asked = templates.conversation(sample, self.prompts[:1] if prompts is None else prompts[:1], 0)
        return whole_videos(asked) if self.stage.model.pixels.video and sample.times_s else asked

    def pictures(self, sample: Sample) -> list[Picture]:
        """What the conversation of `ask` shows: the sample's images, or its video."""
        return [sample.images] if self.stage.model.pixels.video and sample.times_s else list(sample.images)

    def encode(self, conversation: Sequence[Part], *, answer: bool, layouts: Sequence[Layout] = ()) -> Encoded:
        """Ids and labels as in training, or (not `answer`) the prompt that ends where the assistant is to speak.

        Raises BadSample for a conversation without an answer, DataError for a prompt that fills the whole context.
        """
        return self.streams.train(conversation, layouts) if answer else self.streams.ask(conversation, layouts)

    def batch(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[Sequence[Picture] | Tensor], *, answer: bool
    ) -> Batch:
        """What the model reads: with answers padded on the right, as prompts on the left.

        `images[i]` are the pictures of conversation i, or their features (n, P, F). Raises DataError when they are
        not as many as the conversation shows.
        """
        rows = self._rows(conversations, self._see(conversations, images), answer=answer)
        return self._collate(rows, answer=answer)

    # --- judging -----------------------------------------------------------------------------------------------------

    def scores(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[Sequence[Picture] | Tensor]
    ) -> list[Score]:
        """The log-likelihood of every conversation's answers, stop strings included, ROWS at a time."""
        rows = self._rows(conversations, self._see(conversations, images), answer=True)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].encoded.ids))  # of like length: little padding
        scores: dict[int, Score] = {}
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            scores |= zip(chosen, self._scores(self._collate([rows[i] for i in chosen], answer=True)), strict=True)
        return [scores[i] for i in range(len(rows))]

    def loglik(self, samples: Sequence[Sample]) -> list[float]:
        """Nats, summed over each sample's tokens with loss."""
        conversations, shown = [self.ask(s) for s in samples], [self.pictures(s) for s in samples]
        return [s.loglik for s in self.scores(conversations, shown)]

    def likelihoods(self, image: Picture | Tensor, candidates: Sequence[str], question: str | None = None) -> Tensor:
        """(C,) nats: each candidate as the answer about one image, given as a picture or as features (P, F)."""
        seen: Sequence[Picture] | Tensor = image.unsqueeze(0) if isinstance(image, Tensor) else [image]
        prompts = None if question is None else (question,)
        asked = [self.ask(pair("candidate", b"", candidate), prompts) for candidate in candidates]
        if not hasattr(self.model, "continuations"):
            return torch.tensor([score.loglik for score in self.scores(asked, [seen] * len(asked))])
        (looked,) = self._see(asked[:1], [seen])
        encoded = [self.encode(conversation, answer=True, layouts=looked.layouts) for conversation in asked]
        start = min(next(i for i, label in enumerate(e.labels) if label != IGNORE) for e in encoded)
        prompt_1T = torch.tensor([encoded[0].ids[:start]], device=self.device)
        cut = {"layouts": torch.tensor(looked.layouts)} if looked.layouts else {}
        if said := self.streams.instruction(asked[0]):
            cut["instruction"] = torch.tensor([said], device=self.device)
        columns = getattr(self.model, "targets", torch.Tensor.clone)  # END lies in a column of the wiring's own
        nats = []
        with self._resting():
            for i in range(0, len(encoded), ROWS * 2):
                some = encoded[i : i + ROWS * 2]  # padded on the right: no loss there, and nothing behind it to mislead
                rest_CR, _ = padded([e.ids[start:] for e in some], 0)
                labels_CR, _ = padded([e.labels[start:] for e in some], IGNORE)
                logits_CRV = self.model.continuations(prompt_1T, rest_CR.to(self.device), looked.features, **cut)
                loss_CR = F.cross_entropy(
                    logits_CRV.float().transpose(1, 2), columns(labels_CR.to(self.device)), reduction="none"
                )
                nats.append(-loss_CR.sum(1))
        return torch.cat(nats).cpu()

    def prior(
        self, candidates: Sequence[str], question: str | None = None, references: Sequence[Picture | Tensor] = ()
    ) -> Tensor:
        """(C,) nats: how likely each candidate is whatever the image, as the mean over `references`.

        Without references it is what a square of the tower's mean colour makes of them.
        """
        given = references or [self._mean_square()]
        return torch.stack([self.likelihoods(r, candidates, question) for r in given]).mean(0)

    def rank(
        self,
        image: Picture | Tensor,
        candidates: Sequence[str],
        question: str | None = None,
        references: Sequence[Picture | Tensor] = (),
    ) -> list[Ranked]:
        """Best first. The prior is taken off, for else short and common answers win whatever the image shows."""
        if not candidates:
            raise DataError("there is nothing to rank; give at least one candidate")
        gain_C = self.likelihoods(image, candidates, question) - self.prior(candidates, question, references)
        ranked = [Ranked(c, float(gain)) for c, gain in zip(candidates, gain_C, strict=True)]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    def choose(self, conversation: Sequence[Part], images: Sequence[Picture], choices: Sequence[str]) -> list[Ranked]:
        """Which of `choices` answers the conversation, best first: `rank` for any conversation and several images."""
        if not choices:
            raise DataError("there is nothing to choose from; give at least one answer")
        answered = [[*conversation, Part("assistant", text=choice)] for choice in choices]
        seen, blank = self.features(images), self.features([self._mean_square()] * len(images))
        nats = [self.scores(answered, [shown] * len(choices)) for shown in ((seen, blank) if images else (seen,))]
        gains = [first.loglik - (nats[1][i].loglik if images else 0.0) for i, first in enumerate(nats[0])]
        ranked = [Ranked(choice, gain) for choice, gain in zip(choices, gains, strict=True)]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    def embed_images(self, images: Sequence[Picture] | Tensor) -> Tensor:
        """(N, D) float32 of length 1, or (N, Q, D), one for each query; from pictures or features (N, P, F)."""
        embed = self._able("embed_images", "embed images")
        seen_NPF = images if isinstance(images, Tensor) else self.features(images)
        with self._resting():
            return cast(Tensor, embed(seen_NPF))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 of length 1."""
        embed = self._able("embed_texts", "embed texts")
        embedded = []
        with self._resting():
            for i in range(0, len(texts), ROWS):
                batch = self._texts(texts[i : i + ROWS])
                embedded.append(embed(batch.ids_BT, batch.attention_BT, batch.labels_BT))
        return torch.cat(embedded)

    def match(self, images: Sequence[Picture] | Tensor, texts: Sequence[str]) -> Tensor:
        """(N,) logits that image i and text i belong together, where the wiring has a head for it."""
        match = self._able("match", "match images and texts")
        seen_NPF = images if isinstance(images, Tensor) else self.features(images)
        logits = []
        with self._resting():
            for i in range(0, len(texts), ROWS):
                batch = self._texts(texts[i : i + ROWS])
                logits.append(match(batch.ids_BT, batch.attention_BT, seen_NPF[i : i + ROWS]))
        return torch.cat(logits)

    # --- writing -----------------------------------------------------------------------------------------------------

    def stream(
        self,
        conversation: Sequence[Part],
        images: Sequence[Picture] | Tensor = (),
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """The answer piece by piece; `close()`, or dropping it, ends the work.

        One seed gives one answer, whatever else runs in the process. Raises DataError for a prompt that fills the
        context, SpecError for a `sampling` out of range.
        """
        inputs, room = self._asked([conversation], [images])
        return Stream(self.model, inputs, self.tokenizer, self._endings, room, **sampling)

    def generate(
        self,
        conversation: Sequence[Part],
        images: Sequence[Picture] | Tensor = (),
        **sampling: Unpack[Sampling],
    ) -> Generation:
        """The whole answer: what `stream` gives, in one piece."""
        stream = self.stream(conversation, images, **sampling)
        text, usage = "".join(stream), stream.usage
        return Generation(text, usage.prompt_tokens, usage.completion_tokens, usage.finish_reason or "length")

    def write(
        self,
        conversations: Sequence[Sequence[Part]],
        images: Sequence[Sequence[Picture] | Tensor],
        seeds: Sequence[int],
        **sampling: Any,
    ) -> list[str]:
        """Whole answers, written side by side, each with draws of its own seed; `sampling` as `together` takes it."""
        inputs, room = self._asked(conversations, images)
        return together(self.model, inputs, self.tokenizer, self._endings, room, seeds, **sampling)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _asked(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[Sequence[Picture] | Tensor]
    ) -> tuple[dict[str, Tensor], int]:
        """What `generate` reads, and how many tokens fit behind it."""
        self._able("generate", "write")
        batch = self.batch(conversations, images, answer=False)
        inputs = {name: tensor for name, tensor in batch.inputs().items() if name != "labels"}
        return inputs, self.stage.model.context - batch.ids_BT.shape[1]

    def _square(self, image: Picture) -> NDArray[np.uint8]:
        if isinstance(image, np.ndarray):
            return image
        pixels = self.stage.model.pixels
        if isinstance(image, tuple):
            raise DataError("a video is read where a conversation shows it; give one of its frames")
        return read_square(image, pixels) if isinstance(image, bytes) else to_square(image, pixels)

    def _mean_square(self) -> NDArray[np.uint8]:
        pixels = self.stage.model.pixels
        colour_3 = np.array([round(255 * mean) for mean in pixels.mean], np.uint8)
        return np.broadcast_to(colour_3[:, None, None], (3, pixels.size, pixels.size))

    def _features(self, squares: Sequence[NDArray[np.uint8]]) -> Tensor:
        with self._resting():
            some = (torch.from_numpy(np.stack(squares[i : i + ROWS])) for i in range(0, len(squares), ROWS))
            seen = [self.model.vision(pixels_NHW.to(self.device)) for pixels_NHW in some]
            tower = self.model.vision.config
            return torch.cat(seen) if seen else torch.zeros(0, tower.tokens, tower.feature_width, device=self.device)

    def _see(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[Sequence[Picture] | Tensor]
    ) -> list["_Seen"]:
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
            _Seen(given, self._still(len(given)))
            if isinstance(given, Tensor)
            else _Seen(features, [layout for _, layout in pictures if layout])
            for given, features, pictures in zip(images, computed, cut, strict=True)
        ]

    def _still(self, images: int) -> list[Layout]:
        """The layouts of images of one square: none, but beside videos."""
        pixels = self.stage.model.pixels
        return [Layout(0, 0, pixels.size, pixels.size)] * images if pixels.video else []

    def _tiles(self, picture: Picture) -> tuple[NDArray[np.uint8], Layout | None]:
        pixels = self.stage.model.pixels
        if isinstance(picture, tuple):
            frames = np.stack([read_square(frame, pixels) for frame in picture])
            return frames, Layout(1, len(frames) - 1, pixels.size, pixels.size)
        if not pixels.grids or isinstance(picture, np.ndarray):
            return self._square(picture)[None], next(iter(self._still(1)), None)
        return lay_out(decode(picture) if isinstance(picture, bytes) else picture, pixels)

    def _rows(self, conversations: Sequence[Sequence[Part]], seen: Sequence["_Seen"], *, answer: bool) -> list["_Row"]:
        return [
            _Row(self.encode(c, answer=answer, layouts=s.layouts), s, self.streams.instruction(c))
            for c, s in zip(conversations, seen, strict=True)
        ]

    def _texts(self, texts: Sequence[str]) -> Batch:
        """Captions, padded on the right, each with the places of an image that is not looked at."""
        asked = [self.ask(pair("text", b"", text)) for text in texts]
        nothing = _Seen(torch.zeros(0, 1, 1), [])
        return self._collate(self._rows(asked, [nothing] * len(asked), answer=True), answer=True)

    def _collate(self, rows: Sequence["_Row"], *, answer: bool) -> Batch:
        made = [
            Row(0, i, str(i), 0, row.encoded.ids, row.encoded.labels, _ELSEWHERE,
                layouts=tuple(row.seen.layouts), instruction=row.instruction)
            for i, row in enumerate(rows)
        ]  # fmt: skip
        batch = collate(made, pad_id=self.tokenizer.pad_token_id, side="right" if answer else "left").to(self.device)
        return replace(batch, features_NPD=torch.cat([row.seen.features for row in rows]))

    def _scores(self, batch: Batch) -> list[Score]:
        with self._resting():
            outputs = self.model(**batch.inputs())
            logits_BTV, next_BT = outputs.logits_BTV, outputs.labels_BT[:, 1:]
            has_loss_BT = next_BT != IGNORE
            # only the places with loss are widened to float32: the vocabulary is the largest tensor of all
            nats = F.cross_entropy(logits_BTV[:, :-1][has_loss_BT].float(), next_BT[has_loss_BT], reduction="none")
            sums_B = torch.zeros(len(next_BT), device=nats.device).index_add(0, has_loss_BT.nonzero()[:, 0], nats)
        return [Score(-s, n) for s, n in zip(sums_B.tolist(), has_loss_BT.sum(-1).tolist(), strict=True)]

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """No gradient, no dropout; the mode is put back behind it."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            if training:
                self.model.train()

    def _able(self, method: str, what: str) -> Any:
        """The wiring's own method. Raises SpecError where it has none."""
        found = getattr(self.model, method, None)
        if found is None:
            raise SpecError(
                f"stage {self.stage.name} cannot {what}: its wiring is a {type(self.stage.model).__name__}; "
                "take a stage, or a system, that does"
            )
        return found
