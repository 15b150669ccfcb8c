"""Losses: callables on a wiring's outputs that return per-sample sums.

`count()` returns the divisor of each sample. The trainer reduces sums and counts over all ranks,
divides once and multiplies by `weight`: a mean over micro-batches or ranks is not the mean over
the batch when their counts differ. Per-sample values let a source of the mixture have a mean and
a weight of its own.
"""

from bridgework.losses.answering import Answering
from bridgework.losses.classification import Classification
from bridgework.losses.contrastive import Contrastive, MomentumContrastive, QueryContrast
from bridgework.losses.dpo import DPO
from bridgework.losses.language_modeling import LanguageModeling
from bridgework.losses.matching import Matching

__all__ = [
    "DPO",
    "Answering",
    "Classification",
    "Contrastive",
    "LanguageModeling",
    "Matching",
    "MomentumContrastive",
    "QueryContrast",
]
