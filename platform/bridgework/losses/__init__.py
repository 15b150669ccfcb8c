"""Losses: each a spec that is called on a wiring's outputs and says what every sample adds to a sum and to its divisor.

Sums, because a mean of micro-batches or of ranks is not the mean of the batch when their counts differ: whoever trains
adds up sums and counts over all ranks, divides once, and multiplies by `weight`. By sample, because a source of the
mixture may have a mean and a weight of its own.
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
