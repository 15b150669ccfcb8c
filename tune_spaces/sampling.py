"""Sampling of the quickstart's two sources: alpha, a factor, and a cap on epochs.

alpha = 0 takes equal shares, 0.5 the square root of the sizes (InstructBLIP), 1 the sizes.

bridgework sweep sampling
"""

from ray import tune

from bridgework.tuning.space import Metric, SweepBudget

SYSTEM = "llava:quickstart"
STAGES = ("warm", "align")
FIXED = {"stages.warm.budget.steps": 150, "stages.align.budget.steps": 12}
SPACE = {
    "stages.*.data.alpha": tune.uniform(0.0, 1.0),
    "stages.*.data.sources.emoji.factor": tune.loguniform(0.25, 4.0),
    "stages.*.data.sources.emoji.max_epochs": tune.choice([None, 4.0, 16.0]),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(trials=12, concurrent=2, judgments=2)
