"""Inference interface to a trained model: used by evaluation, the command line and serving.

    ask                                   answer one question about one image
    scores, score_answers, loglik         log-likelihoods of given answers
    rank, rank_answers, classify          candidates or classes, best first
    generate, generate_batch, stream      generated answers
    embed_images, embed_texts, match      vectors and matching logits

All methods build the same input: images with their tiles or frames, the prompt and the second token
stream.
"""

# B batch  T tokens  N images  P patches  F width of the tower's features  C candidates  R tokens of
# one  D width

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridgework import artifacts
from bridgework.data.collate import Batch, padded
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError, SpecError, suggest
from bridgework.inference.generation import (
    FinishReason,
    Sampling,
    StopConditions,
    Stream,
    generate_batch,
)
from bridgework.inference.preprocess import (
    ROWS,
    ConversationImages,
    EncodedExample,
    EncodedImage,
    ImageInput,
    ImageSource,
    Inputs,
    RawImage,
    read_image,
)
from bridgework.models import lora
from bridgework.models.base import eval_no_grad
from bridgework.system import IGNORE, Scoring, Stage


class Score(NamedTuple):
    """Log-likelihood of an answer."""

    loglik: float  # nats, summed over the tokens with loss
    tokens: int  # with loss


class Ranked(NamedTuple):
    """Candidate and its score: nats according to `Scoring`.

    A cosine or class logit for a model without an LM.
    """

    candidate: str
    score: float


@dataclass(frozen=True)
class Generation:
    """Generated answer with its token counts."""

    text: str
    prompt_tokens: int  # images included
    completion_tokens: int  # including the token that ended it
    finish_reason: FinishReason


class Pipeline:
    """Model and its stage, which defines prompts and image layout.

    The model may still be training, because every method restores the training mode afterwards.
    """

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        self.model = cast(Any, model)  # a wiring; `_method` checks which methods it has
        self.stage = stage
        self.inputs = Inputs(model, stage)
        self.tokenizer = self.inputs.streams.tokenizer

    @cached_property
    def stop_conditions(self) -> StopConditions:
        """Tokens and texts that end a generated answer."""
        return StopConditions.of(self.inputs.streams, getattr(self.model, "endings", frozenset()))

    @classmethod
    def load(
        cls, path: str | Path, device: str | None = None, *, adapters: bool = False
    ) -> "Pipeline":
        """Load the weights artifact in the folder `path`.

        Args:
            path: an artifact's folder.
            device: default: a GPU if there is one, otherwise the CPU. On a GPU, the model has the
                precision of its training (bf16 or float32); on a CPU, float32.
            adapters: keep low-rank adapters. By default they are merged into their matrices, which
                saves two matrix products for each. The sums then differ by rounding.

        Returns:
            The pipeline of the artifact's model and stage.

        Raises:
            WeightsError: `path` does not contain an artifact, or the artifact is damaged.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = artifacts.load(path, place)
        if not adapters:
            lora.merge(loaded.model)
        half = place.type == "cuda" and loaded.stage.zero.precision == "bf16"
        return cls(loaded.model.to(torch.bfloat16) if half else loaded.model, loaded.stage)

    def ask(self, image: ImageSource, question: str = "", **options: Unpack[Sampling]) -> str:
        """Answer a question about one image.

        The prompt is that of `bridgework ask`: the image, then the question, in the template of the
        stage.

        Args:
            image: a path of an image file, its bytes, an open binary file, or a PIL image; not a
                URL.
            question: default: the question of the stage's training, e.g. a request for a caption.
            options: fields of `Sampling`, e.g. `max_new_tokens=64` or `temperature=0.7`. By default
                the answer is greedy and has at most 128 tokens.

        Returns:
            The complete answer, without the stop token or stop string.

        Raises:
            DataError: the file cannot be read, or the prompt fills the context.
            BadSample: the content is not an image.
            SpecError: an option is out of range, or the stage's model does not generate text.

        Example:
            >>> from bridgework import Pipeline
            >>> pipeline = Pipeline.load("./artifact")
            >>> answer = pipeline.ask("photos/0.png", "What is drawn?", max_new_tokens=20)
            >>> with open("photos/0.png", "rb") as file:
            ...     ranked = pipeline.rank(file.read(), ["a red circle", "a blue square"])
            >>> sorted(candidate for candidate, score in ranked)
            ['a blue square', 'a red circle']
        """
        conversation = self.inputs.question(question)
        return self.generate(conversation, [read_image(image)], **options).text

    # --- log-likelihoods and rankings
    # --------------------------------------------------------------

    def scores(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[ConversationImages]
    ) -> list[Score]:
        """Return the log-likelihood of every conversation's answers, including stop strings.

        The model runs on `ROWS` conversations at a time.
        """
        examples = self.inputs.examples(conversations, images, answer=True)
        # sorted by length, so that a batch has little padding
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].encoded.ids))
        scores: dict[int, Score] = {}
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            batch = self.inputs.collate([examples[i] for i in chosen], answer=True)
            scores |= zip(chosen, self._score_batch(batch), strict=True)
        return [scores[i] for i in range(len(examples))]

    def loglik(self, samples: Sequence[Sample]) -> list[float]:
        """Return nats, summed over each sample's tokens with loss."""
        conversations = [self.inputs.ask(sample) for sample in samples]
        images = [self.inputs.pictures(sample) for sample in samples]
        return [score.loglik for score in self.scores(conversations, images)]

    def score_answers(
        self, conversation: Sequence[Part], images: ConversationImages, candidates: Sequence[str]
    ) -> list[Score]:
        """Return the score of each candidate as the next answer of one conversation.

        Only that answer is scored. If the wiring can continue a prompt, the prompt goes through the
        model once.

        Raises:
            DataError: a candidate does not fit into the context after the prompt.
            BadSample: a candidate is blank.
        """
        (encoded,) = self.inputs.encode_conversation_images([conversation], [images])
        examples = self.inputs.answers(conversation, encoded, candidates)
        if hasattr(self.model, "continuations"):
            return [
                score
                for i in range(0, len(examples), ROWS * 2)
                for score in self._score_continuations(examples[i : i + ROWS * 2])
            ]
        batches = [examples[i : i + ROWS] for i in range(0, len(examples), ROWS)]
        return [
            score
            for batch in batches
            for score in self._score_batch(self.inputs.collate(batch, answer=True))
        ]

    def log_likelihoods(
        self, image: ImageInput | Tensor, candidates: Sequence[str], question: str | None = None
    ) -> Tensor:
        """Return (C,) nats of the candidates as answers about an image, or its features (P, F)."""
        scores = self.score_answers(self.inputs.about(question), _single(image), candidates)
        return torch.tensor([score.loglik for score in scores])

    def log_prior(
        self,
        candidates: Sequence[str],
        question: str | None = None,
        references: Sequence[ImageInput | Tensor] = (),
    ) -> Tensor:
        """Return (C,) nats of each candidate without the image content: the mean over `references`.

        The default reference is one square of the tower's mean color.
        """
        images = references or [self.inputs.mean_square()]
        return torch.stack([self.log_likelihoods(i, candidates, question) for i in images]).mean(0)

    def rank(
        self,
        image: ImageInput | Tensor,
        candidates: Sequence[str],
        question: str | None = None,
        references: Sequence[ImageInput | Tensor] = (),
        scoring: Scoring | None = None,
    ) -> list[Ranked]:
        """Rank candidates as the answer about one image, best first.

        Args:
            image: an image, or its features (P, F).
            candidates: at least one.
            question: default: the question of the stage's training.
            references: images whose mean is the prior; default: a blank image.
            scoring: default: the stage's own.

        Raises:
            DataError: there is no candidate, a candidate does not fit into the context, or it is
                not a class.
            SpecError: a question is given, but the stage reads none.
        """
        if not candidates:
            raise DataError(
                "rank: there is nothing to rank. Got no candidates; expected at least one. "
                "Fix: give candidates"
            )
        if "logits" not in self.model.provides and not self.classes:
            return self._rank_by_similarity(image, candidates, question)
        return self.rank_answers(
            self.inputs.about(question),
            _single(image),
            candidates,
            scoring=scoring,
            references=references,
        )

    def rank_answers(
        self,
        conversation: Sequence[Part],
        images: ConversationImages,
        choices: Sequence[str],
        *,
        scoring: Scoring | None = None,
        references: Sequence[ImageInput | Tensor] = (),
    ) -> list[Ranked]:
        """Rank `choices` as the next answer of a conversation, best first.

        The conversation may show several images or videos, tiled as for `generate`.

        Args:
            conversation: ends where the answer is due.
            images: images of the conversation, or features (n, P, F) of one square each.
            choices: at least one.
            scoring: default: the stage's own. If it subtracts a prior, the prior is that of blank
                images of the same layout, or the mean over `references`.
            references: images for the prior.

        Raises:
            DataError: there is no choice, or a choice does not fit into the context.
            BadSample: a choice is blank.
            SpecError: the stage compares texts with one image, and there are several.
        """
        if not choices:
            raise DataError(
                "rank_answers: there is nothing to choose from. Got no choices; "
                "expected at least one. Fix: give at least one answer"
            )
        if "logits" not in self.model.provides:
            if len(images) != 1:
                raise SpecError(
                    f"stage {self.stage.name}: it compares texts with one image. Got {len(images)} "
                    "images; expected 1. Fix: ask about one image at a time"
                )
            question = "".join(part.text or "" for part in conversation).strip() or None
            return (self._rank_classes if self.classes else self._rank_by_similarity)(
                images[0], choices, question
            )
        scoring = self.stage.scoring if scoring is None else scoring
        (encoded,) = self.inputs.encode_conversation_images([conversation], [images])
        scores = self.score_answers(conversation, encoded, choices)
        priors = [0.0] * len(choices)
        if scoring.prior and encoded:
            blanks = [_single(r) for r in references] or [self.inputs.blank_images(encoded)]
            nats_RC = [
                [s.loglik for s in self.score_answers(conversation, blank, choices)]
                for blank in blanks
            ]
            priors = torch.tensor(nats_RC).mean(0).tolist()
        ranked = [
            Ranked(c, scoring(s.loglik, prior, s.tokens))
            for c, s, prior in zip(choices, scores, priors, strict=True)
        ]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the stage's classification head; () if it has none."""
        found: tuple[str, ...] = getattr(self.stage.model, "classes", ())
        return found

    def classify(self, images: Sequence[RawImage] | Tensor) -> Tensor:
        """Return (N, C) logits of `classes`, from images or features (N, P, F)."""
        classify = self._method("classify", "classify images")
        with eval_no_grad(self.model):
            return cast(
                Tensor,
                classify(images if isinstance(images, Tensor) else self.inputs.features(images)),
            )

    def _rank_classes(
        self, image: ImageInput | Tensor, choices: Sequence[str], question: str | None
    ) -> list[Ranked]:
        if question is not None:
            raise SpecError(
                f"stage {self.stage.name}: it classifies an image and reads no question. "
                f"Got {question!r}. Fix: leave out the question"
            )
        if unknown := [choice for choice in choices if choice not in self.classes]:
            raise DataError(
                f"stage {self.stage.name}: {unknown[0]!r} is not one of its {len(self.classes)} "
                "classes" + suggest(unknown[0], self.classes)
            )
        (logits_C,) = self.classify(_features(image)).tolist()
        ranked = [Ranked(choice, logits_C[self.classes.index(choice)]) for choice in choices]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    def _rank_by_similarity(
        self, image: ImageInput | Tensor, texts: Sequence[str], question: str | None
    ) -> list[Ranked]:
        if question is not None:
            raise SpecError(
                f"stage {self.stage.name}: it compares an image with texts and reads no question. "
                f"Got {question!r}. Fix: leave out the question, and give complete captions as "
                "candidates"
            )
        image_KD = self.embed_images(_features(image)).flatten(0, -2)
        cosines_N = (self.embed_texts(texts) @ image_KD.T).amax(1)
        ranked = [
            Ranked(text, float(cosine)) for text, cosine in zip(texts, cosines_N, strict=True)
        ]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    def embed_images(self, images: Sequence[RawImage] | Tensor) -> Tensor:
        """Return float32 vectors of length 1: (N, D), or (N, Q, D) with one vector per query.

        `images` are images or features (N, P, F). Raises SpecError if the stage's model does not
        embed images.
        """
        embed = self._method("embed_images", "embed images")
        features_NPF = images if isinstance(images, Tensor) else self.inputs.features(images)
        with eval_no_grad(self.model):
            return cast(Tensor, embed(features_NPF))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return (N, D) float32 vectors of length 1.

        Raises SpecError if the stage's model does not embed texts.
        """
        embed = self._method("embed_texts", "embed texts")
        embedded = []
        with eval_no_grad(self.model):
            for i in range(0, len(texts), ROWS):
                batch = self.inputs.texts(texts[i : i + ROWS])
                embedded.append(embed(batch.ids_BT, batch.attention_BT, batch.labels_BT))
        return torch.cat(embedded)

    def match(self, images: Sequence[RawImage] | Tensor, texts: Sequence[str]) -> Tensor:
        """Return (N,) logits that image i and text i match.

        Raises SpecError if the wiring has no matching head.
        """
        match = self._method("match", "match images and texts")
        features_NPF = images if isinstance(images, Tensor) else self.inputs.features(images)
        logits = []
        with eval_no_grad(self.model):
            for i in range(0, len(texts), ROWS):
                batch = self.inputs.texts(texts[i : i + ROWS])
                logits.append(match(batch.ids_BT, batch.attention_BT, features_NPF[i : i + ROWS]))
        return torch.cat(logits)

    # --- generation
    # --------------------------------------------------------------------------------

    def stream(
        self,
        conversation: Sequence[Part],
        images: ConversationImages = (),
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Return the answer as an iterator of pieces.

        `close()`, or dropping the iterator, ends the generation.
        The same seed gives the same answer, independent of other requests in the process.

        Raises:
            DataError: the prompt fills the context.
            SpecError: a field of `sampling` is out of range, or the stage's model does not generate
                text.
        """
        inputs, room = self._prompt_inputs([conversation], [images])
        return Stream(self.model, inputs, self.tokenizer, self.stop_conditions, room, **sampling)

    def generate(
        self,
        conversation: Sequence[Part],
        images: ConversationImages = (),
        **sampling: Unpack[Sampling],
    ) -> Generation:
        """Return the complete answer: the pieces of `stream`, joined.

        Raises the errors of `stream`.
        """
        stream = self.stream(conversation, images, **sampling)
        text, usage = "".join(stream), stream.usage
        return Generation(
            text, usage.prompt_tokens, usage.completion_tokens, usage.finish_reason or "length"
        )

    def generate_batch(
        self,
        conversations: Sequence[Sequence[Part]],
        images: Sequence[ConversationImages],
        seeds: Sequence[int],
        **sampling: Any,
    ) -> list[str]:
        """Return the complete answers of a batch; row i is drawn with `seeds[i]`.

        `sampling` are the keyword arguments of `generation.generate_batch`. Raises the errors of
        `stream`.
        """
        inputs, room = self._prompt_inputs(conversations, images)
        return generate_batch(
            self.model, inputs, self.tokenizer, self.stop_conditions, room, seeds, **sampling
        )

    def check_generates(self) -> None:
        """Raise SpecError if the stage's model does not generate text."""
        self._method("generate", "generate text")

    # --- internals
    # ---------------------------------------------------------------------------------

    def _prompt_inputs(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[ConversationImages]
    ) -> tuple[dict[str, Tensor], int]:
        """Return the inputs of `generate` and the number of tokens that fit after the prompt."""
        self.check_generates()
        batch = self.inputs.batch(conversations, images, answer=False)
        inputs = {name: tensor for name, tensor in batch.inputs().items() if name != "labels"}
        return inputs, self.stage.model.context - batch.ids_BT.shape[1]

    def _score_continuations(self, examples: Sequence[EncodedExample]) -> list[Score]:
        """Return the scores of several answers to one conversation.

        The prompt goes through the model once.
        """
        encoded, device = [example.encoded for example in examples], self.inputs.device
        start = min(next(i for i, label in enumerate(e.labels) if label != IGNORE) for e in encoded)
        prompt_1T = torch.tensor([encoded[0].ids[:start]], device=device)
        layouts = [image.layout for image in examples[0].images if image.layout is not None]
        extra = {"layouts": torch.tensor(layouts)} if layouts else {}
        if examples[0].instruction:
            extra["instruction"] = torch.tensor([examples[0].instruction], device=device)
        # the END token has a logit column of the wiring's own
        columns = getattr(self.model, "targets", torch.Tensor.clone)
        rest_CR, _ = padded([e.ids[start:] for e in encoded], IGNORE)
        labels_CR, _ = padded([e.labels[start:] for e in encoded], IGNORE)
        rest_CR, labels_CR = rest_CR.to(device), labels_CR.to(device)
        labeled_CR = labels_CR != IGNORE
        with eval_no_grad(self.model):
            features_NPF = self.inputs.concat_features(examples[0].images)
            logits_CRV = self.model.continuations(prompt_1T, rest_CR, features_NPF, **extra)
            nats_L = F.cross_entropy(
                logits_CRV[labeled_CR].float(), columns(labels_CR)[labeled_CR], reduction="none"
            )
        sums_C = nats_L.new_zeros(len(encoded)).index_add(0, labeled_CR.nonzero()[:, 0], nats_L)
        counts_C = labeled_CR.sum(1)
        return [Score(-nats, n) for nats, n in zip(sums_C.tolist(), counts_C.tolist(), strict=True)]

    def _score_batch(self, batch: Batch) -> list[Score]:
        with eval_no_grad(self.model):
            outputs = self.model(**batch.inputs())
            logits_BTV, next_BT = outputs.logits_BTV, outputs.labels_BT[:, 1:]
            has_loss_BT = next_BT != IGNORE
            # only positions with loss are converted to float32, because the logits are the largest
            # tensor
            nats = F.cross_entropy(
                logits_BTV[:, :-1][has_loss_BT].float(), next_BT[has_loss_BT], reduction="none"
            )
            sums_B = torch.zeros(len(next_BT), device=nats.device).index_add(
                0, has_loss_BT.nonzero()[:, 0], nats
            )
        return [
            Score(-s, n) for s, n in zip(sums_B.tolist(), has_loss_BT.sum(-1).tolist(), strict=True)
        ]

    def _method(self, method: str, what: str) -> Any:
        """Return a method of the wiring. Raises SpecError if the wiring does not have it."""
        found = getattr(self.model, method, None)
        if found is None:
            raise SpecError(
                f"stage {self.stage.name}: it cannot {what}. "
                f"Got a {type(self.stage.model).__name__}. "
                f"Fix: use a stage, or a system, whose model can {what}"
            )
        return found


def _single(image: ImageInput | Tensor) -> ConversationImages:
    """Return one image, or its features (P, F), as the images of a conversation."""
    return image.unsqueeze(0) if isinstance(image, Tensor) else [image]


def _features(image: ImageInput | Tensor) -> Sequence[RawImage] | Tensor:
    """Return one image for a model that reads squares.

    Of an encoded image, the features of its base square.
    """
    if isinstance(image, EncodedImage):
        return image.features[:1]
    return image.unsqueeze(0) if isinstance(image, Tensor) else [image]
