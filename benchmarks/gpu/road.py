"""Every tiny stage of every system on one GPU in bfloat16, compared with float32 on a CPU.

python -m benchmarks.gpu.road       one line per stage: the first loss on the GPU and on the CPU

The models are tiny, so the times do not show speed. Needs torch, transformers, peft,
deepspeed and pyarrow, not Ray; stages that train on curated data of another stage are skipped.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("LOCAL_RANK", "0")

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from bridgework.data import reader
from bridgework.data.collate import collate
from bridgework.data.tokenization import load_tokenizer
from bridgework.models import base
from bridgework.system import Stage, System, load, recipes
from bridgework.tracking.tracker import Journal
from bridgework.training import loop
from bridgework.training.step import TrainingModule


def on_gpu(job: loop.TrainJob) -> tuple[float, float]:
    """Run the loop of `bridgework train`; return (loss of the first step, seconds of the last)."""
    job.folder.mkdir(parents=True)
    loop.run(
        job,
        lambda at: reader.local(job.feed, rank=0, world=1, start=at),
        lambda *_: None,
        rank=0,
        world=1,
    )
    points = [p for _, points in Journal(job.folder / "journal").points() for p in points]
    losses, seconds = ([p.value for p in points if p.key == key] for key in ("loss", "step_s"))
    return losses[0], seconds[-1]


def on_cpu(job: loop.TrainJob, stage: Stage) -> float:
    """Return the loss of the first step in float32, without an engine."""
    model, _ = loop.build_model(job, stage)
    base.set_trainable(model, stage.trains)
    step = TrainingModule(model, stage.losses).train()
    pad = load_tokenizer(stage.model.tokenizer).pad_token_id or 0
    batch = collate(next(reader.local(job.feed, rank=0, world=1, start=0)), pad_id=pad)
    with torch.no_grad():
        sums_LS, counts_LS = step(batch), step.counts([batch])
    own = [source.loss_weight for source in stage.data.leaves]
    weights_S = torch.tensor([1.0 if weight is None else weight for weight in own])
    divisors_LS = counts_LS.sum(1, keepdim=True) if None in own else counts_LS
    means_L = (weights_S * sums_LS / divisors_LS.clamp(min=1)).sum(1)
    return float(
        sum(loss.weight * mean for loss, mean in zip(stage.losses, means_L.tolist(), strict=True))
    )


def job_of(name: str, stage: Stage, home: Path) -> loop.TrainJob:
    folder = home / "runs" / name
    parent = None if stage.starts_from is None else folder / stage.starts_from / "artifact"
    system = System(name=name, paper="", stages=(replace(stage, starts_from=None),))
    return loop.TrainJob(
        system, stage.name, reader.ReaderConfig.of(stage, home), folder / stage.name, home, parent
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
    )
    table = Table("system", "stage", "bf16, GPU", "fp32, CPU", "ms a step", box=None)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["BRIDGEWORK_HOME"] = scratch
        for name in recipes():
            for tiny in (stage for stage in load(name).tiny().stages if stage.curation is None):
                stage = replace(tiny, evals=(), zero=replace(tiny.zero, precision="bf16"))
                job = job_of(name, stage, Path(scratch))
                loss, seconds = on_gpu(job)
                table.add_row(
                    name,
                    stage.name,
                    f"{loss:.4f}",
                    f"{on_cpu(job, stage):.4f}",
                    f"{1000 * seconds:.0f}",
                )
    console = Console(width=100)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    console.print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
