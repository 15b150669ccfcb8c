"""The learning rate as a function of the step: linear warm-up, then the decay down to `final_lr`."""

import math

from bridgework.system import AdamW


def learning_rate(optim: AdamW, step: int, steps: int) -> float:
    """The rate of `step`, counted from 0, in a stage of `steps`; the first step already moves."""
    warmup = math.ceil(optim.warmup * steps - 1e-9)  # 2,000 / n of n steps are 2,000, whatever n
    if step < warmup:
        return optim.peak_lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if optim.decay == "constant":
        return optim.peak_lr
    if optim.decay == "exponential":
        return float(optim.peak_lr * (optim.final_lr / optim.peak_lr) ** progress)
    return optim.final_lr + (optim.peak_lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
