"""How large a stage's model is, counted on the meta device: no weights are loaded and no memory is taken."""

import torch

from bridgework.models.base import ParameterCounts, count, set_trainable
from bridgework.system import Stage


def parameter_counts(stage: Stage) -> ParameterCounts:
    """Trainable and frozen parameters of a stage. Raises SpecError for a glob that matches nothing."""
    with torch.device("meta"):
        model = stage.model.build(pretrained=False)
    set_trainable(model, stage.trains)
    return count(model)
