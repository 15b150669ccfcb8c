"""Search space for the quick start's first stage: bridge, learning rate and mixture.

bridgework sweep quickstart_warm              a minute on 2 cores, with cached features
bridgework sweep quickstart_warm --trials 32  more trials

A trial is the complete stage, so its score compares with that of a run of the recipe.
"""

from ray import tune

from bridgework.tuning.space import Metric, SweepBudget

SYSTEM = "llava:quickstart"
STAGES = ("warm",)
SPACE = {
    "stages.warm.model.bridge": tune.choice(
        ["mlp(depth=1,dropout=0.5)", "mlp(dropout=0.5)", "mlp(dropout=0.2)"]
    ),
    "stages.warm.optim.peak_lr": tune.loguniform(3e-4, 3e-3),
    "stages.warm.data.alpha": tune.choice([0.0, 0.5, 1.0]),  # equal shares, square root, by size
}
METRIC = Metric(name="retrieval.image_to_text_r1", mode="max")
BUDGET = SweepBudget(trials=4, concurrent=2, judgments=1)
