"""Evaluations of a stage's weights: specs in a recipe, run at the end of a stage and by `bridgework eval`.

Each gives metrics under its own name (`ranking.accuracy`) beside what chance would give, and pictures where a figure
needs one. Rows are drawn by a seed, so that two runs are judged on the same ones.
"""

from bridgework.evaluation.heldout import HeldOutLoss
from bridgework.evaluation.ranking import Ranking
from bridgework.evaluation.result import Result
from bridgework.evaluation.retrieval import Retrieval

__all__ = ["HeldOutLoss", "Ranking", "Result", "Retrieval"]
