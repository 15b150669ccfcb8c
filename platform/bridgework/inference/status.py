"""Limits and counters of an engine, and the times of a request. Loads no torch."""

from dataclasses import dataclass

from bridgework.config import config_class, positive
from bridgework.errors import SpecError


@config_class
class EngineLimits:
    """Bounds of an engine."""

    rows: int = 16  # sequences in one batch
    waiting: int = 256  # sequences that wait for a row; the next one is refused
    tokens: int = 16_384  # places for keys and values in the batch: rows times the longest row
    image_bytes: int = 2**28  # of the cache of vision features; 0: none
    prefix_bytes: int = 2**29  # of the cache of prefixes; 0: none

    def __post_init__(self) -> None:
        positive("engine", self, "rows", "waiting", "tokens")
        for name in ("image_bytes", "prefix_bytes"):
            if getattr(self, name) < 0:
                raise SpecError(f"engine.{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class EngineStatus:
    """Counters of an engine. Those of tokens, queries and hits only grow."""

    running: int  # sequences in slots
    waiting: int  # sequences that wait for a slot
    cached_tokens: int  # places of the slots in use
    max_cached_tokens: int  # their limit
    image_queries: int  # images that requests showed
    image_hits: int  # of these, images whose features or prefix were in a cache
    prefix_queries: int  # tokens of all prompts
    prefix_hits: int  # of these, tokens whose keys and values were in the prefix cache
    prompt_tokens: int  # of all admitted requests, images included
    generation_tokens: int


@dataclass(frozen=True)
class RequestTimes:
    """Times of one finished sequence in seconds, for the metrics of a replica."""

    queue_s: float  # from the submission to the slot
    first_token_s: float | None  # from the submission to the first token; None if there was none
    inter_token_s: tuple[float, ...]  # between consecutive tokens
    end_to_end_s: float  # from the submission to the end
    finish_reason: str  # stop, length, abort (cancelled) or error
    prompt_tokens: int
    completion_tokens: int
