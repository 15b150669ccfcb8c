"""Temperature and negatives of contrastive stages: those of BLIP-2's first stage.

bridgework sweep contrastive
"""

from ray import tune

from bridgework.evaluation import Retrieval
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "blip2", True
STAGES = ("represent",)
FIXED = {"stages.represent.budget.steps": 32}
EVALS = (Retrieval(name="retrieval", dataset="synthetic:shapes", rows=32),)
SPACE = {
    "stages.represent.model.temperature": tune.loguniform(0.01, 0.5),
    "stages.represent.losses.matching.negatives": tune.choice(["all", "lane"]),
    "stages.represent.optim.peak_lr": tune.loguniform(3e-4, 1e-2),
}
METRIC = Metric(name="retrieval.image_to_text_r5", mode="max")
BUDGET = SweepBudget(trials=8, concurrent=2, cpus=0.5)
