"""Gates and resampler of a tiny Flamingo on synthetic pairs: a minute on 2 cores.

bridgework sweep tiny_flamingo
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "flamingo", True
STAGES = ("train",)
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=16),)
SPACE = {
    "stages.train.model.bridge.latents": tune.choice([4, 8]),
    "stages.train.model.gates.alpha": tune.choice(["scalar", "vector"]),
    "stages.train.optim.peak_lr": tune.loguniform(3e-4, 1e-2),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(trials=4, concurrent=2, cpus=0.5, judgments=2)
