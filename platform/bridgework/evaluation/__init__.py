"""Evaluations of a stage's weights: specs in a recipe, run at the end of a stage and by `bridgework eval`.

Each gives metrics under its own name (`ranking.accuracy`) beside what chance would give, and pictures where a figure
needs one. Rows are drawn by a seed, so that two runs are judged on the same ones.
"""

from bridgework.evaluation.base import Result, Writing
from bridgework.evaluation.captioning import Captions
from bridgework.evaluation.classification import Classification, LinearProbe
from bridgework.evaluation.few_shot import FewShot
from bridgework.evaluation.hallucination import CHAIR, POPE
from bridgework.evaluation.likelihood import HeldOutLoss, Ranking
from bridgework.evaluation.multiple_choice import MultipleChoice, WrittenChoice
from bridgework.evaluation.retrieval import Retrieval
from bridgework.evaluation.vqa import VQA
from bridgework.evaluation.yes_no import YesNo
from bridgework.evaluation.zero_shot import ZeroShot

__all__ = [
    "CHAIR",
    "POPE",
    "VQA",
    "Captions",
    "Classification",
    "FewShot",
    "HeldOutLoss",
    "LinearProbe",
    "MultipleChoice",
    "Ranking",
    "Result",
    "Retrieval",
    "Writing",
    "WrittenChoice",
    "YesNo",
    "ZeroShot",
]
