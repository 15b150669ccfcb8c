"""Population based training of a tiny LLaVA: the learning rate, and the factor of a source.

bridgework sweep tiny_population       a minute on 2 cores, on synthetic pairs
"""

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.tuning.space import Metric, SweepBudget

SYSTEM, TINY = "llava", True
STAGES = ("align", "instruct")
FIXED = {"stages.align.budget.steps": 8, "stages.instruct.budget.steps": 24}
EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=32),)
SPACE = {
    "stages.instruct.optim.peak_lr": tune.loguniform(1e-4, 3e-2),
    "stages.instruct.data.sources.llava.factor": tune.loguniform(0.25, 4.0),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(stopper="pbt", population=4, judgments=3, concurrent=2, cpus=0.5)
