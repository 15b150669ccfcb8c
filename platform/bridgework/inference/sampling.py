"""Choice of one sequence's next token: penalties, biases, a grammar, then greedy or by a seed.

Each sequence has a sampler with a random generator of its own, so that the draws of a seed do not
depend on other sequences.
"""

# V vocabulary

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from bridgework.errors import SpecError
from bridgework.inference.generation import sampling_processors


class TokenLogprob(NamedTuple):
    """Log-probability of a token, in nats, by the model's own distribution."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob) of the most likely ones


class Constraint(Protocol):
    """Grammar of an answer, and its state."""

    def mask(self, logits_V: Tensor) -> Tensor:
        """Return the logits with -inf for tokens that the grammar does not allow next."""

    def accept(self, token: int) -> None:
        """Advance by a token."""


class TokenSampler:
    """Chooses the tokens of one sequence."""

    def __init__(
        self,
        device: torch.device,
        endings: frozenset[int],
        *,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Set the options of `EngineSampling`.

        Raises SpecError for one that is out of range.
        """
        if temperature < 0 or not 0 < top_p <= 1 or not 0 < repetition_penalty < inf:
            raise SpecError(
                "sampling: temperature is at least 0, top_p in (0, 1] and repetition_penalty "
                f"above 0. Got {temperature:g}, {top_p:g} and {repetition_penalty:g}"
            )
        self._device, self._endings, self._min = device, sorted(endings), min_new_tokens
        self._draw = sampling_processors(temperature, top_p, [seed], device)
        self._repetition = None
        if repetition_penalty != 1:
            self._repetition = RepetitionPenaltyLogitsProcessor(float(repetition_penalty))
        self._presence, self._frequency = presence_penalty, frequency_penalty
        self._bias = dict(logit_bias or {})
        self._logprobs = logprobs
        self._constraint = constraint
        self._counts: Counter[int] = Counter()
        self._generated = 0

    @property
    def plain(self) -> bool:
        """True if the next token is the most likely one."""
        return not (
            self._draw
            or self._repetition
            or self._presence
            or self._frequency
            or self._bias
            or self._constraint
            or self._logprobs is not None
            or self._generated < self._min
        )

    def __call__(self, logits_V: Tensor, history: Sequence[int]) -> TokenLogprob:
        """Return the next token; the logprob is 0 if none is asked for.

        `history` holds the ids that the decoder has read as tokens: a prompt's, if it is not
        embeddings, and the generated ones.
        """
        raw_V = logits_V.float()
        logits_V = raw_V.clone()
        if self._repetition is not None:
            ids_1T: Any = torch.tensor([list(history)], dtype=torch.long, device=logits_V.device)
            logits_V = self._repetition(ids_1T, cast(Any, logits_V[None]))[0]
        if self._counts and (self._presence or self._frequency):
            ids = torch.tensor(list(self._counts), device=logits_V.device)
            counts = torch.tensor(list(self._counts.values()), device=logits_V.device)
            logits_V[ids] -= self._presence + self._frequency * counts
        for token, bias in self._bias.items():
            logits_V[token] += bias
        if self._constraint is not None:
            logits_V = self._constraint.mask(logits_V)
        if self._generated < self._min:
            logits_V[self._endings] = -inf
        ids_10: Any = torch.zeros(1, 0, dtype=torch.long, device=logits_V.device)
        token = int(self._draw(ids_10, cast(Any, logits_V[None])).argmax())
        self.accept(token)
        return TokenLogprob(token, 0.0) if self._logprobs is None else self._scored(raw_V, token)

    def accept(self, token: int) -> None:
        """Count a token that was chosen."""
        self._generated += 1
        if self._presence or self._frequency:
            self._counts[token] += 1
        if self._constraint is not None:
            self._constraint.accept(token)

    def _scored(self, raw_V: Tensor, token: int) -> TokenLogprob:
        logprobs_V = raw_V.log_softmax(-1)
        values, ids = logprobs_V.topk(min(self._logprobs or 0, len(logprobs_V)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token, float(logprobs_V[token]), top)
