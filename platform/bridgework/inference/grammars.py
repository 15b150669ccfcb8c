"""Answers of a required form: JSON, or JSON of a schema, by masks over the next tokens (llguidance).

A mask leaves the tokens with which the text so far can still become a complete answer.
"""

# V vocabulary

import json
from collections.abc import Mapping
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bridgework.errors import SpecError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# An unbounded blank between two values would let a model write blanks up to its last token.
COMPACT: "JsonCompileOptions" = {"whitespace_pattern": "[ \\n]?"}


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of JSON texts that fulfil a JSON schema.

    Raises SpecError for a schema that is not valid, or uses what masks cannot express.
    """
    try:
        grammar = str(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=COMPACT))
        problem = LLMatcher.validate_grammar(grammar)
    except ValueError as error:
        problem = str(error)
    if problem:
        reason = " ".join(problem.split())[:300]
        raise SpecError(f"json_schema: it cannot be used as a constraint. Got: {reason}")
    return grammar


class Grammars:
    """Constraints of answers for one tokenizer, whose vocabulary is read once. Safe in threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: LLTokenizer | None = None
        self._lock = Lock()

    def constraint(self, schema: Mapping[str, Any], endings: frozenset[int]) -> "GrammarConstraint":
        """Return the state of one answer: JSON of a schema, then one of `endings`.

        Raises SpecError for a tokenizer that is not a fast one, or a schema that is not valid.
        """
        grammar = json_grammar(schema)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read(endings)
        return GrammarConstraint(self._vocabulary, grammar, endings)

    def _read(self, endings: frozenset[int]) -> LLTokenizer:
        known: Any = sorted(token for token in endings if token < len(self._tokenizer))
        try:
            return from_tokenizer(cast(Any, self._tokenizer), eos_token=known or None)
        except ValueError as error:
            raise SpecError(
                f"grammar: the tokenizer of this model cannot be constrained. Got: {error}. "
                "Fix: leave out response_format"
            ) from None


class GrammarConstraint:
    """Grammar of one answer, and its state."""

    def __init__(self, vocabulary: LLTokenizer, grammar: str, endings: frozenset[int]) -> None:
        self._matcher = LLMatcher(vocabulary, grammar)
        self._check()
        self._endings = sorted(endings)

    def mask(self, logits_V: Tensor) -> Tensor:
        """Return the logits with -inf for tokens that the grammar does not allow next."""
        allowed_V = np.zeros(len(logits_V), dtype=bool)
        if self._matcher.is_stopped():
            allowed_V[self._endings] = True
        else:
            packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
            bits = np.unpackbits(packed, bitorder="little")[: len(logits_V)]
            allowed_V[: len(bits)] = bits
            # an ending of the wiring's own is no token of the tokenizer
            allowed_V[self._endings] = allowed_V[self._endings].any()
        return logits_V.masked_fill(~torch.from_numpy(allowed_V).to(logits_V.device), -inf)

    def accept(self, token: int) -> None:
        """Advance by a token."""
        if not self._matcher.is_stopped() and token not in self._endings:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if problem := self._matcher.get_error():
            raise SpecError(f"grammar: {' '.join(problem.split())[:300]}")
