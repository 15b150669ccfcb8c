"""Bridge and learning rates of a tiny LLaVA on synthetic pairs: a minute on 2 cores.

bridgework sweep tiny_llava
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "llava", True
STAGES = (
    "align",
    "instruct",
)
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=16),)
SPACE = {
    "stages.*.model.bridge": tune.choice(["linear", "mlp", "resampler(latents=4, depth=1)"]),
    "stages.align.optim.peak_lr": tune.loguniform(3e-4, 1e-2),
    "stages.instruct.optim.peak_lr": tune.loguniform(3e-4, 1e-2),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(trials=4, concurrent=2, cpus=0.5, judgments=2)
