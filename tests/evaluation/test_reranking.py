"""Re-ranking: what the matching head may change, and what it may not."""

import pytest
import torch
from torch import Tensor

from bridgework.errors import SpecError
from bridgework.evaluation import Retrieval
from bridgework.evaluation.retrieval import OUT, reranked

GENERATOR = torch.Generator().manual_seed(0)
ALIKE, LOGITS = torch.rand(5, 8, generator=GENERATOR), 10 * torch.randn(5, 8, generator=GENERATOR)


def judge(row: int, candidates: Tensor) -> Tensor:
    return LOGITS[row, candidates]


def test_only_the_nearest_candidates_are_reranked() -> None:
    scores = reranked(ALIKE, judge, 3)
    near = torch.zeros_like(ALIKE, dtype=torch.bool).scatter(1, ALIKE.topk(3).indices, True)
    assert torch.equal(scores[near], (ALIKE + LOGITS)[near]) and torch.equal(
        scores[~near], (ALIKE - OUT)[~near]
    )
    assert (scores.topk(3).indices.sort().values == ALIKE.topk(3).indices.sort().values).all()


@pytest.mark.parametrize("keep", [8, 100])
def test_with_all_candidates_the_order_is_by_match_and_cosine(keep: int) -> None:
    torch.testing.assert_close(reranked(ALIKE, judge, keep), ALIKE + LOGITS)


def test_without_candidates_the_order_is_by_cosine() -> None:
    assert torch.equal(reranked(ALIKE, judge, 0).argsort(), ALIKE.argsort())


def test_fewer_candidates_than_none_are_refused() -> None:
    with pytest.raises(SpecError, match="got -1; expected 0 or more"):
        Retrieval(dataset="x", rerank=-1)
