"""Parameter counts of a stage, from the meta device: no weights are loaded, no memory is used."""

import torch

from bridgework.models.base import ParameterCounts, count, set_trainable
from bridgework.system import Stage


def parameter_counts(stage: Stage) -> Counts:
    """Count a stage's trainable and frozen parameters.

    Raises SpecError for a glob that matches no parameter.
    """
    with torch.device("meta"):
        model = stage.model.build(pretrained=False)
    set_trainable(model, stage.trains)
    return count(model)
