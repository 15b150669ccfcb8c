"""Parameter counts of a stage: no weights are loaded, no memory is used.

The counts of the recipes that ship are in recipes/parameter_counts.json, by a fingerprint of the
model and of what trains, because building the models on the meta device takes seconds of imports.
`python -m tests.house.parameter_counts` writes that file, and a test recomputes it.
"""

import json
from functools import cache
from importlib.resources import files

import torch

from bridgework.config import to_dict
from bridgework.models.base import ParameterCounts, count, set_trainable
from bridgework.system import Stage, fingerprint

FILE = "parameter_counts.json"  # in bridgework.recipes


def parameter_counts(stage: Stage) -> ParameterCounts:
    """Count a stage's trainable and frozen parameters.

    Raises SpecError for a glob that matches no parameter.
    """
    known = _shipped().get(key(stage))
    return compute(stage) if known is None else ParameterCounts(*known)


def key(stage: Stage) -> str:
    """Return 12 hex digits of all that the counts depend on."""
    return fingerprint([to_dict(stage.model), dict(stage.trains)])


def compute(stage: Stage) -> ParameterCounts:
    """Count on the meta device. Raises SpecError for a glob that matches no parameter."""
    with torch.device("meta"):
        model = stage.model.build(pretrained=False)
    set_trainable(model, stage.trains)
    return count(model)


@cache
def _shipped() -> dict[str, list[int]]:
    text = files("bridgework.recipes").joinpath(FILE).read_text(encoding="utf-8")
    found: dict[str, list[int]] = json.loads(text)
    return found
