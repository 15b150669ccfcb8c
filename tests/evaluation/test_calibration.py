"""Expected calibration error against the definition, bin by bin."""

import numpy as np
import pytest

from bridgework.evaluation.calibration import calibration_gaps


def test_the_mean_is_the_calibration_error_of_the_paper() -> None:
    """Guo et al. 2017, equation 3."""
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.2, 1.0, 500)
    right = draw.random(500) < confidence**2
    expected = 0.0
    for low in np.arange(10) / 10:
        own = (confidence > low) & (confidence <= low + 0.1)
        if own.any():
            expected += own.mean() * abs(right[own].mean() - confidence[own].mean())
    assert calibration_gaps(confidence, right, bins=10).mean() == pytest.approx(expected)


def test_a_calibrated_model_has_a_small_error_and_a_sure_wrong_one_an_error_of_1() -> None:
    draw = np.random.default_rng(1)
    confidence = draw.uniform(0.0, 1.0, 20_000)
    assert calibration_gaps(confidence, draw.random(20_000) < confidence).mean() < 0.02
    assert calibration_gaps([1.0, 1.0], [False, False]).mean() == 1.0
    assert calibration_gaps([0.0], [False]).mean() == 0.0
