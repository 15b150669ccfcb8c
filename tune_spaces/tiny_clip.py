"""Temperature and learning rate of a tiny CLIP on synthetic pairs: a minute on 2 cores.

bridgework sweep tiny_clip
"""

from ray import tune

from bridgework.evaluation import Retrieval
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "clip", True
STAGES = ("contrast",)
EVALS = (Retrieval(name="retrieval", dataset="synthetic:shapes", rows=32),)
SPACE = {
    "stages.contrast.losses.contrastive.temperature": tune.choice([None, 0.03, 0.07, 0.2]),
    "stages.contrast.optim.peak_lr": tune.loguniform(1e-4, 1e-2),
}
METRIC = Metric(name="retrieval.image_to_text_r5", mode="max")
BUDGET = SweepBudget(trials=4, concurrent=2, cpus=0.5, judgments=2)
