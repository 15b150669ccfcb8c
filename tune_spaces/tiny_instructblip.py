"""Mixture and learning rate of a tiny InstructBLIP on synthetic pairs: a minute on 2 cores.

bridgework sweep tiny_instructblip
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "instructblip", True
STAGES = (
    "represent",
    "generate",
    "instruct",
)
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=16),)
SPACE = {
    "stages.instruct.data.alpha": tune.choice([0.0, 0.5, 1.0]),
    "stages.instruct.optim.peak_lr": tune.loguniform(3e-4, 1e-2),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(trials=4, concurrent=2, cpus=0.5, judgments=2)
