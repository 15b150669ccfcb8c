"""Search space for LLaVA's first stage on a laptop: learning rate and bridge, by retrieval.

bridgework sweep llava_warm       a minute on 2 idle cores; examples/winner.sh runs it
"""

from ray import tune

from bridgework.tuning.space import Metric, SweepBudget

SYSTEM = "llava:quickstart"
STAGES = ("warm",)
FIXED = {"stages.warm.budget.steps": 120}  # of every trial
SPACE = {
    "stages.warm.optim.peak_lr": tune.loguniform(5e-4, 3e-3),
    "stages.warm.model.bridge": tune.choice(["linear", "mlp"]),
}
METRIC = Metric(name="retrieval.text_to_image_r10", mode="max")
BUDGET = SweepBudget(trials=2, concurrent=1, judgments=1)
