"""One interface to a trained model, for evaluation, for the command line and for serving.

Answers are scored (`scores`, `score_answers`), ranked (`rank`, `choose`), written (`generate`, `stream`) and embedded.
All of them read the same input: the pictures with their tiles or frames, the prompt, the second token stream.
"""

# B batch  T tokens  N images  P patches  F width of the tower's features  C candidates  R tokens of one  D width

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
    Example,
    Inputs,
    Picture,
    Raw,
    Seen,
    Shown,
)
from bridgework.models.base import eval_no_grad
from bridgework.system import IGNORE, Scoring, Stage


class Score(NamedTuple):
    """The log-likelihood of an answer."""

    loglik: float  # nats, summed over the tokens with loss
    tokens: int


class Ranked(NamedTuple):
    """A candidate and its score: nats as `Scoring` says; where nothing is written, a cosine or a class's logit."""

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
        self.inputs = Inputs(model, stage)
        self.tokenizer = self.inputs.streams.tokenizer

    @cached_property
    def _endings(self) -> StopConditions:
        """The tokens and texts that end an answer, of a model that writes."""
        return StopConditions.of(self.inputs.streams, getattr(self.model, "endings", frozenset()))

    @classmethod
    def load(cls, path: str, device: str | None = None) -> "Pipeline":
        """The weights artifact under `path`, on a GPU if there is one; there in the precision of its training."""
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = artifacts.load(path, place)
        half = place.type == "cuda" and loaded.stage.zero.precision == "bf16"
        return cls(loaded.model.to(torch.bfloat16) if half else loaded.model, loaded.stage)

    # --- judging -----------------------------------------------------------------------------------------------------

    def scores(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[Shown]
    ) -> list[Score]:
        """The log-likelihood of every conversation's answers, stop strings included, ROWS at a time."""
        examples = self.inputs.examples(conversations, images, answer=True)
        order = sorted(
            range(len(examples)), key=lambda i: len(examples[i].encoded.ids)
        )  # by length: little padding
        scores: dict[int, Score] = {}
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            batch = self.inputs.collate([examples[i] for i in chosen], answer=True)
            scores |= zip(chosen, self._scores(batch), strict=True)
        return [scores[i] for i in range(len(examples))]

    def loglik(self, samples: Sequence[Sample]) -> list[float]:
        """Nats, summed over each sample's tokens with loss."""
        conversations, shown = (
            [self.inputs.ask(s) for s in samples],
            [self.inputs.pictures(s) for s in samples],
        )
        return [s.loglik for s in self.scores(conversations, shown)]

    def score_answers(
        self, conversation: Sequence[Part], images: Shown, candidates: Sequence[str]
    ) -> list[Score]:
        """Return the score of each candidate as the next answer of one conversation: of that answer alone.

        The prompt goes through the model once where the wiring can continue it. Raises DataError where a candidate
        does not fit into the context, BadSample for a blank one.
        """
        (seen,) = self.inputs.look([conversation], [images])
        examples = self.inputs.answers(conversation, seen, candidates)
        if hasattr(self.model, "continuations"):
            return [
                score
                for i in range(0, len(examples), ROWS * 2)
                for score in self._continued(examples[i : i + ROWS * 2])
            ]
        batches = [examples[i : i + ROWS] for i in range(0, len(examples), ROWS)]
        return [
            score
            for some in batches
            for score in self._scores(self.inputs.collate(some, answer=True))
        ]

    def log_likelihoods(
        self, image: Picture | Tensor, candidates: Sequence[str], question: str | None = None
    ) -> Tensor:
        """Return (C,) nats: each candidate as the answer about one image, or about its features (P, F)."""
        scores = self.score_answers(self.inputs.about(question), _one(image), candidates)
        return torch.tensor([score.loglik for score in scores])

    def prior(
        self,
        candidates: Sequence[str],
        question: str | None = None,
        references: Sequence[Picture | Tensor] = (),
    ) -> Tensor:
        """Return (C,) nats: each candidate's log-likelihood whatever the image, the mean over `references`.

        Without references it is the log-likelihood given one square of the tower's mean color.
        """
        given = references or [self.inputs.mean_square()]
        return torch.stack([self.log_likelihoods(r, candidates, question) for r in given]).mean(0)

    def rank(
        self,
        image: Picture | Tensor,
        candidates: Sequence[str],
        question: str | None = None,
        references: Sequence[Picture | Tensor] = (),
        scoring: Scoring | None = None,
    ) -> list[Ranked]:
        """Rank candidates as the answer about one image, best first: `choose` for what the stage's training asked.

        With `references` the prior is the mean over these images; without, it is that of a blank image.
        """
        if not candidates:
            raise DataError("there is nothing to rank; give at least one candidate")
        if "logits" not in self.model.provides and not self.classes:
            return self._nearest(image, candidates, question)
        return self.rank_answers(
            self.inputs.about(question),
            _one(image),
            candidates,
            scoring=scoring,
            references=references,
        )

    def rank_answers(
        self,
        conversation: Sequence[Part],
        images: Shown,
        choices: Sequence[str],
        *,
        scoring: Scoring | None = None,
        references: Sequence[Picture | Tensor] = (),
    ) -> list[Ranked]:
        """Rank `choices` as the next answer of a conversation, best first, by the stage's own `scoring` or another.

        The conversation may show several images or videos, tiled as for `generate`. Where there is a prior, it is that
        of blank images of the same layout. Raises DataError for no choice, a blank one, and one that does not fit.
        """
        if not choices:
            raise DataError("there is nothing to choose from; give at least one answer")
        if "logits" not in self.model.provides:
            if len(images) != 1:
                raise SpecError(
                    f"stage {self.stage.name} compares texts with one image, got {len(images)}"
                )
            said = "".join(part.text or "" for part in conversation).strip() or None
            return (self._classified if self.classes else self._nearest)(images[0], choices, said)
        how = self.stage.scoring if scoring is None else scoring
        (seen,) = self.inputs.look([conversation], [images])
        scores = self.score_answers(conversation, seen, choices)
        priors = [0.0] * len(choices)
        if how.prior and seen:
            blanks = [_one(r) for r in references] or [self.inputs.blank(seen)]
            nats_RC = [
                [s.loglik for s in self.score_answers(conversation, blank, choices)]
                for blank in blanks
            ]
            priors = torch.tensor(nats_RC).mean(0).tolist()
        ranked = [
            Ranked(c, how(s.loglik, prior, s.tokens))
            for c, s, prior in zip(choices, scores, priors, strict=True)
        ]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that the stage's head names; () where it has none."""
        found: tuple[str, ...] = getattr(self.stage.model, "classes", ())
        return found

    def classify(self, images: Sequence[Raw] | Tensor) -> Tensor:
        """Return (N, C) logits of `classes`, from pictures or features (N, P, F)."""
        classify = self._able("classify", "name classes")
        with eval_no_grad(self.model):
            return cast(
                Tensor,
                classify(images if isinstance(images, Tensor) else self.inputs.features(images)),
            )

    def _classified(
        self, image: Picture | Tensor, choices: Sequence[str], question: str | None
    ) -> list[Ranked]:
        if question is not None:
            raise SpecError(
                f"stage {self.stage.name} names the class of an image and reads no question, got {question!r}"
            )
        if unknown := [choice for choice in choices if choice not in self.classes]:
            raise DataError(
                f"stage {self.stage.name} names {len(self.classes)} classes, and {unknown[0]!r} is none of them"
                + suggest(unknown[0], self.classes)
            )
        (logits_C,) = self.classify(_features(image)).tolist()
        ranked = [Ranked(choice, logits_C[self.classes.index(choice)]) for choice in choices]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    def _nearest(
        self, image: Picture | Tensor, texts: Sequence[str], question: str | None
    ) -> list[Ranked]:
        if question is not None:
            raise SpecError(
                f"stage {self.stage.name} compares an image with texts and reads no question, got {question!r}: "
                "leave it out, and write whole captions as the candidates"
            )
        seen_KD = self.embed_images(_features(image)).flatten(0, -2)
        cosines_N = (self.embed_texts(texts) @ seen_KD.T).amax(1)
        ranked = [
            Ranked(text, float(cosine)) for text, cosine in zip(texts, cosines_N, strict=True)
        ]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    def embed_images(self, images: Sequence[Raw] | Tensor) -> Tensor:
        """(N, D) float32 of length 1, or (N, Q, D), one for each query; from pictures or features (N, P, F)."""
        embed = self._able("embed_images", "embed images")
        seen_NPF = images if isinstance(images, Tensor) else self.inputs.features(images)
        with eval_no_grad(self.model):
            return cast(Tensor, embed(seen_NPF))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 of length 1."""
        embed = self._able("embed_texts", "embed texts")
        embedded = []
        with eval_no_grad(self.model):
            for i in range(0, len(texts), ROWS):
                batch = self.inputs.texts(texts[i : i + ROWS])
                embedded.append(embed(batch.ids_BT, batch.attention_BT, batch.labels_BT))
        return torch.cat(embedded)

    def match(self, images: Sequence[Raw] | Tensor, texts: Sequence[str]) -> Tensor:
        """(N,) logits that image i and text i belong together, where the wiring has a head for it."""
        match = self._able("match", "match images and texts")
        seen_NPF = images if isinstance(images, Tensor) else self.inputs.features(images)
        logits = []
        with eval_no_grad(self.model):
            for i in range(0, len(texts), ROWS):
                batch = self.inputs.texts(texts[i : i + ROWS])
                logits.append(match(batch.ids_BT, batch.attention_BT, seen_NPF[i : i + ROWS]))
        return torch.cat(logits)

    # --- writing -----------------------------------------------------------------------------------------------------

    def stream(
        self,
        conversation: Sequence[Part],
        images: Shown = (),
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
        images: Shown = (),
        **sampling: Unpack[Sampling],
    ) -> Generation:
        """The whole answer: what `stream` gives, in one piece."""
        stream = self.stream(conversation, images, **sampling)
        text, usage = "".join(stream), stream.usage
        return Generation(
            text, usage.prompt_tokens, usage.completion_tokens, usage.finish_reason or "length"
        )

    def generate_batch(
        self,
        conversations: Sequence[Sequence[Part]],
        images: Sequence[Shown],
        seeds: Sequence[int],
        **sampling: Any,
    ) -> list[str]:
        """Whole answers, written side by side, each with draws of its own seed; `sampling` as `together` takes it."""
        inputs, room = self._asked(conversations, images)
        return generate_batch(
            self.model, inputs, self.tokenizer, self._endings, room, seeds, **sampling
        )

    # --- inside ------------------------------------------------------------------------------------------------------

    def _asked(
        self, conversations: Sequence[Sequence[Part]], images: Sequence[Shown]
    ) -> tuple[dict[str, Tensor], int]:
        """What `generate` reads, and how many tokens fit behind it."""
        self._able("generate", "write")
        batch = self.inputs.batch(conversations, images, answer=False)
        inputs = {name: tensor for name, tensor in batch.inputs().items() if name != "labels"}
        return inputs, self.stage.model.context - batch.ids_BT.shape[1]

    def _continued(self, examples: Sequence[Example]) -> list[Score]:
        """The scores of several answers to one conversation, whose prompt is read once."""
        encoded, device = [example.encoded for example in examples], self.inputs.device
        start = min(next(i for i, label in enumerate(e.labels) if label != IGNORE) for e in encoded)
        prompt_1T = torch.tensor([encoded[0].ids[:start]], device=device)
        layouts = [seen.layout for seen in examples[0].seen if seen.layout is not None]
        cut = {"layouts": torch.tensor(layouts)} if layouts else {}
        if examples[0].instruction:
            cut["instruction"] = torch.tensor([examples[0].instruction], device=device)
        columns = getattr(
            self.model, "targets", torch.Tensor.clone
        )  # END has a column of the wiring's own
        # padded on the right: no loss there, and nothing after it to mislead
        rest_CR, _ = padded([e.ids[start:] for e in encoded], 0)
        labels_CR, _ = padded([e.labels[start:] for e in encoded], IGNORE)
        with eval_no_grad(self.model):
            features_NPF = self.inputs.joined(examples[0].seen)
            logits_CRV = self.model.continuations(
                prompt_1T, rest_CR.to(device), features_NPF, **cut
            )
            loss_CR = F.cross_entropy(
                logits_CRV.float().transpose(1, 2), columns(labels_CR.to(device)), reduction="none"
            )
        counts_C = (labels_CR != IGNORE).sum(1)
        return [
            Score(-nats, n)
            for nats, n in zip(loss_CR.sum(1).tolist(), counts_C.tolist(), strict=True)
        ]

    def _scores(self, batch: Batch) -> list[Score]:
        with eval_no_grad(self.model):
            outputs = self.model(**batch.inputs())
            logits_BTV, next_BT = outputs.logits_BTV, outputs.labels_BT[:, 1:]
            has_loss_BT = next_BT != IGNORE
            # only the places with loss are widened to float32: the vocabulary is the largest tensor of all
            nats = F.cross_entropy(
                logits_BTV[:, :-1][has_loss_BT].float(), next_BT[has_loss_BT], reduction="none"
            )
            sums_B = torch.zeros(len(next_BT), device=nats.device).index_add(
                0, has_loss_BT.nonzero()[:, 0], nats
            )
        return [
            Score(-s, n) for s, n in zip(sums_B.tolist(), has_loss_BT.sum(-1).tolist(), strict=True)
        ]

    def _able(self, method: str, what: str) -> Any:
        """The wiring's own method. Raises SpecError where it has none."""
        found = getattr(self.model, method, None)
        if found is None:
            raise SpecError(
                f"stage {self.stage.name} cannot {what}: its wiring is a {type(self.stage.model).__name__}; "
                "take a stage, or a system, that does"
            )
        return found


def _one(image: Picture | Tensor) -> Shown:
    """One image, or its features (P, F), as all that a conversation shows."""
    return image.unsqueeze(0) if isinstance(image, Tensor) else [image]


def _features(image: Picture | Tensor) -> Sequence[Raw] | Tensor:
    """The same for what reads squares: of a picture that was seen, its base square."""
    if isinstance(image, Seen):
        return image.features[:1]
    return image.unsqueeze(0) if isinstance(image, Tensor) else [image]
