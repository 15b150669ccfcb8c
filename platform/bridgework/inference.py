"""One interface to a trained model, for evaluation, for the command line and for serving.

Answers are judged (`scores`, `loglik`, `rank`), written (`generate`, `stream`) and embedded.
"""

# B batch  T tokens  N images  P patches  F width of the tower's features  C candidates  D width

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridgework.data.batch import Batch, padded
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import DataError, SpecError
from bridgework.generation import Endings, FinishReason, Sampling, Stream, together
from bridgework.inputs import ROWS, Inputs, Picture, Shown, resting
from bridgework.system import IGNORE, Stage
from bridgework.training import artefact


class Score(NamedTuple):
    """What a model thinks of one answer."""

    loglik: float  # nats, summed over the tokens with loss
    tokens: int


class Ranked(NamedTuple):
    """A candidate, and by how many nats the image makes it likelier than it is anyway; or the cosine of their vectors.

    The cosine is all there is of a model that writes nothing.
    """

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
        self._endings = Endings.of(self.inputs.streams, getattr(model, "endings", frozenset()))

    @classmethod
    def load(cls, path: str, device: str | None = None) -> "Pipeline":
        """The weights artefact under `path`, on a GPU if there is one; there in the precision of its training."""
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = artefact.load(path, place)
        half = place.type == "cuda" and loaded.stage.shard.precision == "bf16"
        return cls(loaded.model.to(torch.bfloat16) if half else loaded.model, loaded.stage)

    # --- judging -----------------------------------------------------------------------------------------------------

    def scores(self, conversations: Sequence[Sequence[Part]], images: Sequence[Shown]) -> list[Score]:
        """The log-likelihood of every conversation's answers, stop strings included, ROWS at a time."""
        examples = self.inputs.examples(conversations, images, answer=True)
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].encoded.ids))  # by length: little padding
        scores: dict[int, Score] = {}
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            batch = self.inputs.collate([examples[i] for i in chosen], answer=True)
            scores |= zip(chosen, self._scores(batch), strict=True)
        return [scores[i] for i in range(len(examples))]

    def loglik(self, samples: Sequence[Sample]) -> list[float]:
        """Nats, summed over each sample's tokens with loss."""
        conversations, shown = [self.inputs.ask(s) for s in samples], [self.inputs.pictures(s) for s in samples]
        return [s.loglik for s in self.scores(conversations, shown)]

    def likelihoods(self, image: Picture | Tensor, candidates: Sequence[str], question: str | None = None) -> Tensor:
        """(C,) nats: each candidate as the answer about one image, given as a picture or as features (P, F)."""
        seen: Shown = image.unsqueeze(0) if isinstance(image, Tensor) else [image]
        prompts = None if question is None else (question,)
        asked = [self.inputs.ask(pair("candidate", b"", candidate), prompts) for candidate in candidates]
        if not hasattr(self.model, "continuations"):
            return torch.tensor([score.loglik for score in self.scores(asked, [seen] * len(asked))])
        (looked,) = self.inputs.see(asked[:1], [seen])
        encoded = [self.inputs.encode(conversation, answer=True, layouts=looked.layouts) for conversation in asked]
        start = min(next(i for i, label in enumerate(e.labels) if label != IGNORE) for e in encoded)
        prompt_1T = torch.tensor([encoded[0].ids[:start]], device=self.inputs.device)
        cut = {"layouts": torch.tensor(looked.layouts)} if looked.layouts else {}
        if said := self.inputs.streams.instruction(asked[0]):
            cut["instruction"] = torch.tensor([said], device=self.inputs.device)
        columns = getattr(self.model, "targets", torch.Tensor.clone)  # END lies in a column of the wiring's own
        nats = []
        with resting(self.model):
            for i in range(0, len(encoded), ROWS * 2):
                some = encoded[i : i + ROWS * 2]  # padded on the right: no loss there, and nothing behind it to mislead
                rest_CR, _ = padded([e.ids[start:] for e in some], 0)
                labels_CR, _ = padded([e.labels[start:] for e in some], IGNORE)
                logits_CRV = self.model.continuations(prompt_1T, rest_CR.to(self.inputs.device), looked.features, **cut)
                loss_CR = F.cross_entropy(
                    logits_CRV.float().transpose(1, 2), columns(labels_CR.to(self.inputs.device)), reduction="none"
                )
                nats.append(-loss_CR.sum(1))
        return torch.cat(nats).cpu()

    def prior(
        self, candidates: Sequence[str], question: str | None = None, references: Sequence[Picture | Tensor] = ()
    ) -> Tensor:
        """(C,) nats: how likely each candidate is whatever the image, as the mean over `references`.

        Without references it is what a square of the tower's mean colour makes of them.
        """
        given = references or [self.inputs.mean_square()]
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
        if "logits" not in self.model.gives:
            return self._nearest(image, candidates, question)
        gain_C = self.likelihoods(image, candidates, question) - self.prior(candidates, question, references)
        ranked = [Ranked(c, float(gain)) for c, gain in zip(candidates, gain_C, strict=True)]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    def choose(self, conversation: Sequence[Part], images: Sequence[Picture], choices: Sequence[str]) -> list[Ranked]:
        """Which of `choices` answers the conversation, best first: `rank` for any conversation and several images."""
        if not choices:
            raise DataError("there is nothing to choose from; give at least one answer")
        if "logits" not in self.model.gives:
            if len(images) != 1:
                raise SpecError(f"stage {self.stage.name} compares texts with one image, got {len(images)}")
            return self._nearest(images[0], choices, "".join(part.text or "" for part in conversation).strip() or None)
        answered = [[*conversation, Part("assistant", text=choice)] for choice in choices]
        seen, blank = self.inputs.features(images), self.inputs.features([self.inputs.mean_square()] * len(images))
        nats = [self.scores(answered, [shown] * len(choices)) for shown in ((seen, blank) if images else (seen,))]
        gains = [first.loglik - (nats[1][i].loglik if images else 0.0) for i, first in enumerate(nats[0])]
        ranked = [Ranked(choice, gain) for choice, gain in zip(choices, gains, strict=True)]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    def _nearest(self, image: Picture | Tensor, texts: Sequence[str], question: str | None) -> list[Ranked]:
        if question is not None:
            raise SpecError(
                f"stage {self.stage.name} compares an image with texts and reads no question, got {question!r}: "
                "leave it out, and write whole captions as the candidates"
            )
        seen_KD = self.embed_images(image.unsqueeze(0) if isinstance(image, Tensor) else [image]).flatten(0, -2)
        cosines_N = (self.embed_texts(texts) @ seen_KD.T).amax(1)
        ranked = [Ranked(text, float(cosine)) for text, cosine in zip(texts, cosines_N, strict=True)]
        return sorted(ranked, key=lambda r: r.score, reverse=True)

    def embed_images(self, images: Shown) -> Tensor:
        """(N, D) float32 of length 1, or (N, Q, D), one for each query; from pictures or features (N, P, F)."""
        embed = self._able("embed_images", "embed images")
        seen_NPF = images if isinstance(images, Tensor) else self.inputs.features(images)
        with resting(self.model):
            return cast(Tensor, embed(seen_NPF))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 of length 1."""
        embed = self._able("embed_texts", "embed texts")
        embedded = []
        with resting(self.model):
            for i in range(0, len(texts), ROWS):
                batch = self.inputs.texts(texts[i : i + ROWS])
                embedded.append(embed(batch.ids_BT, batch.attention_BT, batch.labels_BT))
        return torch.cat(embedded)

    def match(self, images: Shown, texts: Sequence[str]) -> Tensor:
        """(N,) logits that image i and text i belong together, where the wiring has a head for it."""
        match = self._able("match", "match images and texts")
        seen_NPF = images if isinstance(images, Tensor) else self.inputs.features(images)
        logits = []
        with resting(self.model):
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
        return Generation(text, usage.prompt_tokens, usage.completion_tokens, usage.finish_reason or "length")

    def write(
        self,
        conversations: Sequence[Sequence[Part]],
        images: Sequence[Shown],
        seeds: Sequence[int],
        **sampling: Any,
    ) -> list[str]:
        """Whole answers, written side by side, each with draws of its own seed; `sampling` as `together` takes it."""
        inputs, room = self._asked(conversations, images)
        return together(self.model, inputs, self.tokenizer, self._endings, room, seeds, **sampling)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _asked(self, conversations: Sequence[Sequence[Part]], images: Sequence[Shown]) -> tuple[dict[str, Tensor], int]:
        """What `generate` reads, and how many tokens fit behind it."""
        self._able("generate", "write")
        batch = self.inputs.batch(conversations, images, answer=False)
        inputs = {name: tensor for name, tensor in batch.inputs().items() if name != "labels"}
        return inputs, self.stage.model.context - batch.ids_BT.shape[1]

    def _scores(self, batch: Batch) -> list[Score]:
        with resting(self.model):
            outputs = self.model(**batch.inputs())
            logits_BTV, next_BT = outputs.logits_BTV, outputs.labels_BT[:, 1:]
            has_loss_BT = next_BT != IGNORE
            # only the places with loss are widened to float32: the vocabulary is the largest tensor of all
            nats = F.cross_entropy(logits_BTV[:, :-1][has_loss_BT].float(), next_BT[has_loss_BT], reduction="none")
            sums_B = torch.zeros(len(next_BT), device=nats.device).index_add(0, has_loss_BT.nonzero()[:, 0], nats)
        return [Score(-s, n) for s, n in zip(sums_B.tolist(), has_loss_BT.sum(-1).tolist(), strict=True)]

    def _able(self, method: str, what: str) -> Any:
        """The wiring's own method. Raises SpecError where it has none."""
        found = getattr(self.model, method, None)
        if found is None:
            raise SpecError(
                f"stage {self.stage.name} cannot {what}: its wiring is a {type(self.stage.model).__name__}; "
                "take a stage, or a system, that does"
            )
        return found
