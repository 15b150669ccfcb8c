"""Continuous batching: one step loop that decodes all running requests of a model together."""

from dataclasses import dataclass


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
