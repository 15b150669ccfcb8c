"""Expected calibration error (Guo et al. 2017, arXiv:1706.04599): confidence against accuracy."""

# R rows

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

BINS = 15  # of equal width, as in the paper


def calibration_gaps(
    confidences: Iterable[float], right: Iterable[bool], bins: int = BINS
) -> NDArray[np.float64]:
    """Return (R,) values with the expected calibration error as their mean, in [0, 1].

    confidences: of the chosen answers, in [0, 1]. A value is the row's accuracy minus its
    confidence, with the sign of its bin. The error is biased upward if bins hold few rows.
    """
    confidence_R = np.array([float(value) for value in confidences])
    gap_R = np.array([float(value) for value in right]) - confidence_R
    bin_R = np.clip(np.ceil(confidence_R * bins).astype(int) - 1, 0, bins - 1)
    sums = np.bincount(bin_R, weights=gap_R, minlength=bins)
    return np.asarray(np.where(sums < 0, -1.0, 1.0)[bin_R] * gap_R)
