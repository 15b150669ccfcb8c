"""Momentum encoder and learning rate of a tiny BLIP on synthetic pairs: a minute on 2 cores.

bridgework sweep tiny_blip
"""

from ray import tune

from bridgework.evaluation import Retrieval
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "blip", True
STAGES = ("pretrain",)
EVALS = (Retrieval(name="retrieval", dataset="synthetic:shapes", rows=32),)
SPACE = {
    "stages.pretrain.model.momentum.decay": tune.choice([0.9, 0.99, 0.995]),
    "stages.pretrain.model.momentum.alpha": tune.uniform(0.0, 0.6),
    "stages.pretrain.optim.peak_lr": tune.loguniform(1e-4, 1e-2),
}
METRIC = Metric(name="retrieval.image_to_text_r5", mode="max")
BUDGET = SweepBudget(trials=4, concurrent=2, cpus=0.5, judgments=2)
