"""Population based training of the quick start's first stage: learning rate, alpha and a factor.

bridgework sweep population       a few minutes on 2 idle cores, with cached features

Eight members train side by side. After each quarter of the steps, the worst two continue from the
checkpoints of the best two, with perturbed values.
"""

from ray import tune

from bridgework.tuning.space import Metric, SweepBudget

SYSTEM = "llava:quickstart"
STAGES = ("warm",)
FIXED = {"stages.warm.budget.steps": 120, "stages.warm.optim.decay": "constant"}
SPACE = {
    "stages.warm.optim.peak_lr": tune.loguniform(1e-4, 1e-2),
    "stages.warm.data.alpha": tune.uniform(0.0, 1.0),  # equal shares .. by size
    "stages.warm.data.sources.emoji.factor": tune.loguniform(0.25, 4.0),
}
METRIC = Metric(name="retrieval.image_to_text_r10", mode="max")
BUDGET = SweepBudget(stopper="pbt", population=8, judgments=4, concurrent=2)
