"""Losses: each a spec that is called on a wiring's outputs and gives a sum, and says what to divide the sum by.

Sums, because a mean of micro-batches or of ranks is not the mean of the batch when their counts differ: whoever trains
adds up sums and counts over all ranks, divides once, and multiplies by `weight`.
"""

from bridgework.losses.captioning import Captioning
from bridgework.losses.contrastive import Contrastive

__all__ = ["Captioning", "Contrastive"]
