"""Queries and learning rate of a tiny BLIP-2 on synthetic pairs: a minute on 2 cores.

bridgework sweep tiny_blip2
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "blip2", True
STAGES = (
    "represent",
    "generate",
)
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=16),)
SPACE = {
    "stages.*.model.bridge.queries": tune.choice([2, 4]),
    "stages.generate.optim.peak_lr": tune.loguniform(3e-4, 1e-2),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(trials=4, concurrent=2, cpus=0.5, judgments=2)
