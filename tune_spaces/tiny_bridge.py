"""A sweep of a minute: the bridge and the learning rate of a tiny LLaVA.

bridgework sweep tiny_bridge --trials 6             on synthetic pairs, 2 cores
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "llava", True
STAGES = ("align",)
FIXED = {"stages.align.budget.steps": 32}
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=32),)
SPACE = {
    "stages.*.model.bridge": {
        "linear": {},
        "mlp": {"stages.*.model.bridge.depth": tune.randint(2, 4)},
    },
    "stages.align.optim.peak_lr": tune.loguniform(1e-3, 3e-2),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(trials=6, concurrent=2, cpus=0.5, judgments=4)
