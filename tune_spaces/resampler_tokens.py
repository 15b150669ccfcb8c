"""Tokens of xGen-MM's resampler: quality against the positions that an image takes in the LM.

bridgework sweep resampler_tokens --prefer "quality <= best + 1%, then tokens"
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "xgen_mm", True
STAGES = ("pretrain",)
FIXED = {"stages.pretrain.budget.steps": 48}
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=32),)
SPACE = {
    "stages.*.model.bridge.latents": tune.choice([2, 4, 8, 16]),
    "stages.*.model.bridge.depth": tune.randint(1, 4),
    "stages.pretrain.optim.peak_lr": tune.loguniform(3e-4, 1e-2),
}
METRIC = (Metric(name="heldout.loss", mode="min"), Metric(name="cost.tokens", mode="min"))
BUDGET = SweepBudget(trials=12, concurrent=2, cpus=0.5, sampler="nsga2", stopper="none")
