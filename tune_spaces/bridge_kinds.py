"""Five kinds of bridge on the first stages of LLaVA: quality against tokens and parameters.

The MLP, the resampler and the Q-Former have about equal trainable parameters (within 6 %).
The linear layer and the concatenation have no field for their size.

bridgework sweep bridge_kinds --prefer "quality <= best + 0.02, then tokens"
"""

from ray import tune

from bridgework.tuning.space import Metric, SweepBudget

SYSTEM = "llava:quickstart"
STAGES = ("warm", "align")
FIXED = {
    "stages.*.model.vision.grid": 2,  # four patches: one would leave nothing to compare
    "stages.warm.budget.steps": 150,
    "stages.align.budget.steps": 24,
}
SPACE = {
    "stages.*.model.bridge": tune.choice(
        [
            "linear",
            "mlp(depth=11)",
            "concat(group=4, ln_vision=False)",
            "resampler(latents=4, depth=1, heads=2, head_width=16, ffn=1)",
            "qformer(queries=4, width=384, depth=2, heads=4, ffn=1024)",
        ]
    ),
    "stages.warm.optim.peak_lr": tune.loguniform(3e-4, 3e-3),
}
METRIC = (
    Metric(name="heldout.loss", mode="min"),
    Metric(name="cost.tokens", mode="min"),
    Metric(name="cost.parameters", mode="min"),
)
BUDGET = SweepBudget(trials=15, concurrent=2, judgments=2, stopper="none")
