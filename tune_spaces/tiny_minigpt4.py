"""Learning rates of both stages of a tiny MiniGPT-4 on synthetic pairs: a minute on 2 cores.

bridgework sweep tiny_minigpt4
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "minigpt4", True
STAGES = (
    "align",
    "polish",
)
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=16),)
SPACE = {
    "stages.align.optim.peak_lr": tune.loguniform(3e-4, 1e-2),
    "stages.polish.optim.peak_lr": tune.loguniform(3e-5, 3e-3),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(trials=4, concurrent=2, cpus=0.5, judgments=2)
