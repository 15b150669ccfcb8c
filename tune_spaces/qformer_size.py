"""Queries and depth of BLIP-2's Q-Former, through both stages.

The first stage is trained once for each size, and shared by the trials that have it in common.

bridgework sweep qformer_size
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "blip2", True
STAGES = ("represent", "generate")
FIXED = {"stages.represent.budget.steps": 24, "stages.generate.budget.steps": 24}
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=32),)
SPACE = {
    "stages.*.model.bridge.queries": tune.choice([2, 4, 8]),
    "stages.*.model.bridge.depth": tune.choice([2, 4]),
    "stages.generate.optim.peak_lr": tune.loguniform(3e-4, 1e-2),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(trials=8, concurrent=2, cpus=0.5)
