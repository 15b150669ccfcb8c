"""Search space for LLaVA's first stages on a laptop: bridge, learning rate and mixture.

bridgework sweep llava_bridge                       a few minutes on 2 cores
bridgework sweep llava_bridge --trials 32           more trials
"""

from ray import tune

from bridgework.tuning.space import Metric, SweepBudget

SYSTEM = "llava:quickstart"
STAGES = ("warm", "align")
FIXED = {"stages.warm.budget.steps": 150, "stages.align.budget.steps": 12}  # of every trial
SPACE = {
    "stages.*.model.bridge": tune.choice(["linear", "mlp", "mlp(depth=3)"]),
    "stages.warm.optim.peak_lr": tune.loguniform(3e-4, 3e-3),
    "stages.*.data.alpha": tune.choice([0.0, 0.5, 1.0]),  # equal shares, square root, by size
}
METRIC = Metric(name="heldout.loss", mode="min")  # less noisy on few rows than ranking accuracy
BUDGET = SweepBudget(trials=4, concurrent=2, judgments=2)
