"""Rank and rate of the LoRA adapters of xGen-MM's safety stage, with DPO before it.

The three stages before the adapters are trained once for all trials.

bridgework sweep lora_rank
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "xgen_mm", True
STAGES = ("pretrain", "instruct", "prefer")
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=16),)
SPACE = {
    "stages.prefer.model.language.lora.rank": tune.choice([1, 2, 4, 8]),
    "stages.prefer.optim.peak_lr": tune.loguniform(1e-5, 1e-2),
}
METRIC = (Metric(name="heldout.loss", mode="min"), Metric(name="cost.parameters", mode="min"))
BUDGET = SweepBudget(trials=6, concurrent=2, cpus=0.5, stopper="none")
