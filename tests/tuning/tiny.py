"""A sweep of seconds: a tiny LLaVA with an evaluation, and its search space."""

from dataclasses import replace

from ray import tune

from bridgework.evaluation import HeldOutLoss
from bridgework.system import System, load
from bridgework.tuning.space import Metric, SweepBudget

EVALS = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=4),)


def system() -> System:
    tiny = load("llava").tiny()
    return replace(tiny, stages=tuple(replace(stage, evals=EVALS) for stage in tiny.stages))


SYSTEM = "tests.tuning.tiny"
STAGES = ("align", "instruct")
FIXED = {
    "stages.align.budget.steps": 3,
    "stages.instruct.budget.steps": 4,
}  # 4 is not a multiple of 3 judgments
SPACE = {
    "stages.*.model.bridge": tune.choice(["linear", "mlp(depth=3)"]),
    "stages.*.optim.peak_lr": tune.loguniform(1e-3, 1e-2),
}
METRIC = Metric(name="heldout.loss", mode="min")
BUDGET = SweepBudget(trials=2, concurrent=1, cpus=0.5, judgments=3, stopper="none")
