"""A training step of LLaVA at full size on one GPU: our engine against a bare torch loop.

python -m benchmarks.gpu.train_step                 a table; about four minutes on an H100
python -m benchmarks.gpu.train_step --json FILE     the same as JSON

align      LLaVA-1.5 7B as published, only the projector is trained (2310.03744, table 9)
instruct   the same tower and projector with a language model of 1.7B, which is trained too

Both loops have the same model and batches. Random weights and random pixels do not change the
arithmetic of a step. The bare loop is plain torch: forward, backward, clip, fused AdamW; frozen
weights in bfloat16, trained ones in float32 under autocast. Ours is the Engine of `bridgework
train`, with DeepSpeed's bfloat16 and float32 master weights. Needs torch, transformers and
deepspeed, not Ray.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("LOCAL_RANK", "0")

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from bridgework.config import override
from bridgework.data.collate import Batch
from bridgework.models import base
from bridgework.system import IGNORE, IMAGE, Stage, load
from bridgework.training.engine import Engine
from bridgework.training.step import TrainingModule

WARM, TIMED = 4, 12  # steps
TEXT = 128  # tokens after each image
ANSWER = 96  # of them with loss
SMALL_LM = {"width": 2048, "depth": 24, "heads": 32, "kv_heads": 32, "ffn": 8192, "vocab": 49152}


def stages() -> dict[str, Stage]:
    """Return the stages with one micro-batch per step, so that both loops do the same."""
    changes: dict[str, Any] = {
        "stages.*.model.vision.weights": None,
        "stages.*.model.language.weights": None,
    }
    system = override(load("llava"), changes | {"stages.*.data.lanes": 1})
    lm = {f"stages.instruct.model.language.{name}": value for name, value in SMALL_LM.items()}
    small = override(
        system, lm | {"stages.instruct.budget.batch": 8, "stages.instruct.budget.micro": 8}
    )
    full = override(system, {"stages.align.budget.batch": 8, "stages.align.budget.micro": 8})
    return {
        "align": full["align"],
        "instruct": override(small, {"stages.instruct.zero.stage": 1})["instruct"],
    }


def batch(stage: Stage, seed: int) -> Batch:
    """Return a micro-batch with one image and TEXT tokens per row."""
    draw = torch.Generator().manual_seed(seed)
    rows, image_tokens, size = stage.budget.micro, stage.model.image_tokens, stage.model.pixels.size
    text_BT = torch.randint(0, 30_000, (rows, TEXT), generator=draw)
    ids_BT = torch.cat([torch.full((rows, image_tokens), IMAGE), text_BT], dim=1)
    labels_BT = ids_BT.clone()
    labels_BT[:, : image_tokens + TEXT - ANSWER] = IGNORE
    pixels_N3SS = torch.randint(0, 256, (rows, 3, size, size), generator=draw, dtype=torch.uint8)
    attention_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    keys, sources = [str(i) for i in range(rows)], [0] * rows
    return Batch(ids_BT, attention_BT, labels_BT, pixels_N3SS, None, keys, sources)


def build_on_gpu(stage: Stage) -> base.VLMModule:
    """Build the model on the GPU in bfloat16: 7B parameters in float32 take too much memory."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model: base.VLMModule = stage.model.build(pretrained=False)
    finally:
        torch.set_default_dtype(default)
    return model.bfloat16()


def ours(stage: Stage) -> Callable[[Batch], float]:
    model = build_on_gpu(stage)
    multipliers = base.set_trainable(model, stage.trains)
    engine = Engine(TrainingModule(model, stage.losses), stage, multipliers)

    def step(one: Batch) -> float:
        return float(engine.train_step([one], stage.optim.peak_lr).losses_L[0])

    return step


def bare(stage: Stage) -> Callable[[Batch], float]:
    model = build_on_gpu(stage)
    names = base.set_trainable(model, stage.trains)
    learned = [p for name, p in model.named_parameters() if name in names]
    for parameter in learned:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(
        learned, lr=stage.optim.peak_lr, betas=stage.optim.betas, weight_decay=0.0, fused=True
    )
    model.train()

    def step(one: Batch) -> float:
        given = one.to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(**given.inputs())
            loss = stage.losses[0](outputs).sum() / stage.losses[0].count(given.labels_BT).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, stage.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(make: Callable[[Stage], Callable[[Batch], float]], stage: Stage) -> dict[str, float]:
    """Return seconds of the median step, samples and tokens per second, peak GiB, the last loss."""
    torch.cuda.reset_peak_memory_stats()
    step = make(stage)
    batches = [batch(stage, seed) for seed in range(4)]
    seconds, loss = [], 0.0
    for number in range(WARM + TIMED):
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = step(batches[number % len(batches)])
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[WARM:])
    peak = torch.cuda.max_memory_allocated() / 2**30
    tokens = batches[0].ids_BT.numel()
    return {
        "step_s": median,
        "samples_per_s": stage.budget.micro / median,
        "tokens_per_s": tokens / median,
        "peak_gib": peak,
        "loss": loss,
    }


@contextmanager
def process_group() -> Iterator[None]:
    """Open a process group of one rank, which DeepSpeed requires."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure_in_subprocess(stage: str, loop: str) -> dict[str, float]:
    """Measure in a new process, because DeepSpeed frees its memory only at the end of a process."""
    command = [sys.executable, "-m", "benchmarks.gpu.train_step", "--stage", stage, "--loop", loop]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="number of rounds; each runs both loops, every second one in reverse order",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        with process_group():
            print(json.dumps(measure(LOOPS[given.loop], stages()[given.stage])))
        return
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "stages": {},
    }
    table = Table(
        "stage", "loop", "s a step", "samples/s", "tokens/s", "peak GiB", "bare / ours", box=None
    )
    for name in stages():
        runs: dict[str, list[dict[str, float]]] = {loop: [] for loop in LOOPS}
        for turn in range(given.rounds):
            for loop in list(LOOPS)[:: -1 if turn % 2 else 1]:
                runs[loop].append(measure_in_subprocess(name, loop))
        pairs = zip(runs["ours"], runs["bare"], strict=True)
        ratio = statistics.median(bare["step_s"] / ours["step_s"] for ours, bare in pairs)
        figures["stages"][name] = {**runs, "bare_over_ours": ratio}
        for loop, found in runs.items():
            best = min(found, key=lambda run: run["step_s"])
            numbers = (
                f"{best['step_s']:.3f}",
                f"{best['samples_per_s']:.1f}",
                f"{best['tokens_per_s']:,.0f}",
            )
            table.add_row(
                name,
                loop,
                *numbers,
                f"{best['peak_gib']:.1f}",
                f"{ratio:.2f}" if loop == "ours" else "",
            )
    console = Console(width=120)
    console.print(f"{figures['device']}, torch {figures['torch']}")
    console.print(table)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


LOOPS = {"ours": ours, "bare": bare}

if __name__ == "__main__":
    main()
