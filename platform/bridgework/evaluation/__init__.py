"""Evaluations of a stage's weights: specs in a recipe, run at the end of a stage and by `bridgework eval`.

Each gives metrics under its own name (`ranking.accuracy`) beside what chance would give, and pictures where a figure
needs one. Rows are drawn by a seed, so that two runs are judged on the same ones.
"""

from bridgework.evaluation.few_shot import FewShot
from bridgework.evaluation.heldout import HeldOutLoss
from bridgework.evaluation.ranking import Ranking
from bridgework.evaluation.result import Result
from bridgework.evaluation.retrieval import Retrieval
from bridgework.evaluation.zero_shot import ZeroShot

__all__ = ["FewShot", "HeldOutLoss", "Ranking", "Result", "Retrieval", "ZeroShot"]
