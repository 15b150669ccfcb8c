"""Learning rates of LLaVA's second stage: the peak, and the multiplier of each glob of parameters.

bridgework sweep learning_rates
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "llava", True
STAGES = ("align", "instruct")
FIXED = {"stages.align.budget.steps": 24, "stages.instruct.budget.steps": 24}
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=32),)
SPACE = {
    "stages.instruct.optim.peak_lr": tune.loguniform(1e-4, 1e-2),
    "stages.instruct.trains.language.*": tune.loguniform(0.01, 1.0),
    "stages.instruct.optim.warmup": tune.choice([0.0, 0.03, 0.1]),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(trials=12, concurrent=2, cpus=0.5, sampler="gp")
