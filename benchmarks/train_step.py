"""Our loop on one Ray Train worker against a bare torch loop, same model, batches and threads.

.venv/bin/python -m benchmarks.train_step            both medians and their ratio (1.0: no overhead)
.venv/bin/python -m benchmarks.train_step --json     one JSON line

The bare loop is plain torch with all batches in memory: forward, backward, clip, AdamW. Ours
meanwhile reads, decodes and tokenizes with Ray Data, steps through DeepSpeed, records metrics and
can be resumed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from bridgework.config import override
from bridgework.data.collate import collate
from bridgework.data.reader import ReaderConfig, local
from bridgework.models import base
from bridgework.system import Stage, System, load
from bridgework.tracking.tracker import Journal
from bridgework.training.engine import learning_rate

STEPS = 40  # of a run; the first quarter is not counted
THREADS = 1  # of torch, on both sides


def system(steps: int = STEPS) -> System:
    """Return a small LLaVA whose step takes a large part of a second on one core."""
    changes = {
        "stages.*.model.vision.image_size": 64,
        "stages.*.model.vision.width": 192,
        "stages.*.model.language.width": 256,
        "stages.*.model.language.depth": 6,
        "stages.*.model.language.ffn": 1024,
        "stages.*.budget.steps": steps,
        "stages.*.budget.batch": 16,
        "stages.*.budget.micro": 16,
    }
    small = override(load("llava").tiny(), changes)
    instruct = override(
        small, {"stages.instruct.starts_from": None, "stages.instruct.zero.stage": 0}
    ).stages[1]
    return System(
        name="bench",
        paper="",
        stages=(replace(instruct, data=replace(instruct.data, template="plain")),),
    )


def bare(stage: Stage, home: Path) -> list[float]:
    """Return the seconds of every step of a loop in plain torch."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(stage.seed)
    model = stage.model.build()
    base.set_trainable(model, stage.trains)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=stage.optim.peak_lr, betas=stage.optim.betas, weight_decay=0.0
    )
    batches = [
        collate(rows, pad_id=0)
        for rows in local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)
    ]
    model.train()
    seconds = []
    for step, batch in enumerate(batches):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage.optim, step, stage.budget.steps)
        outputs = model(**batch.inputs())
        loss = stage.losses[0](outputs).sum() / stage.losses[0].count(batch.labels_BT).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, stage.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - began)
    return seconds


def ours(built: System, home: Path, name: str) -> list[float]:
    """Return the seconds of every step of our loop on one Ray Train worker."""
    from bridgework.ray_utils import ray_session
    from bridgework.training.driver import train
    from bridgework.training.options import RunOptions

    options = RunOptions(checkpoint_every=built.stages[0].budget.steps, threads=THREADS)
    with ray_session():
        train(built, home=home, run=name, options=options, console=Console(quiet=True))
    journal = Journal(home / "runs" / name / built.stages[0].name / "journal")
    return [p.value for _, points in journal.points() for p in points if p.key == "step_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--pairs", type=int, default=3, help="runs of both sides")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a run")
    parser.add_argument("--side", choices=("bare", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        home = Path(os.environ["BRIDGEWORK_HOME"])
        built = system(args.steps)
        name = f"bench-{time.time_ns()}"
        print(
            json.dumps(
                bare(built.stages[0], home) if args.side == "bare" else ours(built, home, name)
            )
        )
        return
    medians: dict[str, list[float]] = {"bare": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.pairs):
            for side, found in medians.items():
                command = [sys.executable, "-m", "benchmarks.train_step", "--side", side]
                command += ["--steps", str(args.steps)]
                done = subprocess.run(
                    command,
                    env={**os.environ, "BRIDGEWORK_HOME": folder},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                seconds = json.loads(done.stdout.splitlines()[-1])[args.steps // 4 :]
                found.append(statistics.median(seconds))
    ratios = [b / o for b, o in zip(medians["bare"], medians["ours"], strict=True)]
    result = {side: round(statistics.median(found), 4) for side, found in medians.items()}
    result |= {
        "ratio": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"bare torch   {result['bare']:.3f} s a step\n"
            f"bridgework   {result['ours']:.3f} s a step"
        )
        print(
            f"speed        {result['ratio']:.2f} of the bare loop "
            f"({result['least']:.2f} to {result['most']:.2f})"
        )


if __name__ == "__main__":
    main()
