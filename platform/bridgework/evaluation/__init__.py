"""Evaluations of a stage's weights: specs in a recipe, run after a stage and by `bridgework eval`.

Each returns metrics under its own name (e.g. `ranking.accuracy`), next to the value of chance, and
figures where they help. Rows are drawn by a seed, so that two runs are evaluated on the same rows.
"""

from bridgework.evaluation.base import Result, Writing
from bridgework.evaluation.captioning import Captions
from bridgework.evaluation.classification import Classification, LinearProbe
from bridgework.evaluation.few_shot import FewShot
from bridgework.evaluation.hallucination import CHAIR, POPE
from bridgework.evaluation.latency import Latency
from bridgework.evaluation.likelihood import HeldOutLoss, Ranking
from bridgework.evaluation.multiple_choice import MultipleChoice, WrittenChoice
from bridgework.evaluation.retrieval import Retrieval
from bridgework.evaluation.safety import CounterfactualBias, Refusals
from bridgework.evaluation.vqa import VQA
from bridgework.evaluation.yes_no import YesNo
from bridgework.evaluation.zero_shot import ZeroShot

__all__ = [
    "CHAIR",
    "POPE",
    "VQA",
    "Captions",
    "Classification",
    "CounterfactualBias",
    "FewShot",
    "HeldOutLoss",
    "Latency",
    "LinearProbe",
    "MultipleChoice",
    "Ranking",
    "Refusals",
    "Result",
    "Retrieval",
    "Writing",
    "WrittenChoice",
    "YesNo",
    "ZeroShot",
]
