"""From data to a served model on a laptop, with pretrained weights: `make quickstart`.

verify shards -> train llava:quickstart -> sweep the bridge and the mixture -> promote the better
model -> serve it -> rank candidate captions for held-out images, ask about one of them -> trace the
answer back to the shards. The results are printed and written to <home>/quickstart.json. Running it
again (also as `python -m examples.quickstart`) reuses finished parts.
"""

import base64
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import httpx
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from bridgework.artifacts import StageResult
from bridgework.data.catalog import home as home_folder
from bridgework.data.dataset import open_dataset, verify
from bridgework.data.samples import Sample
from bridgework.errors import BridgeworkError, DataError, TrackingError
from bridgework.evaluation import HeldOutLoss, Ranking, Retrieval
from bridgework.inference.pipeline import Pipeline
from bridgework.ray_utils import ray_session
from bridgework.serving import launch
from bridgework.system import load
from bridgework.tracking import lineage, promotion, registry
from bridgework.tracking.mlflow_store import MLflowTracker
from bridgework.tracking.tracker import Version
from bridgework.training.driver import train
from bridgework.tuning.search import Outcome, sweep
from bridgework.tuning.space import load as load_space

DATA = Path("examples/data")
SETS = ("clipart", "emoji", "heldout_clipart", "heldout_style", "heldout_concepts")
QUESTION = "What is in the picture?"
GATE = "ranking.accuracy"
STYLE, CONCEPTS = f"{DATA}/heldout_style", f"{DATA}/heldout_concepts"
EVALUATIONS = (
    HeldOutLoss(dataset=CONCEPTS, rows=128),
    Ranking(dataset=STYLE, rows=60),
    Ranking(name="concepts_ranking", dataset=CONCEPTS, rows=60),
    Retrieval(dataset=STYLE),
    Retrieval(name="concepts_retrieval", dataset=CONCEPTS),
)
IMAGES, CANDIDATES = 10, 20  # held-out images that are ranked over HTTP, captions of each
console = Console()


@dataclass
class Report:
    """Results and times of the parts, for quickstart.json."""

    seconds: dict[str, float] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, title: str) -> Iterator[None]:
        """Print the title of a part and record its seconds."""
        console.rule(f"[bold]{name}[/]  {title}", align="left")
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)

    def write(self, home: Path) -> Path:
        file = home / "quickstart.json"
        file.write_text(json.dumps({**self.values, "seconds": self.seconds}, indent=1))
        return file


def main() -> None:
    home, report = home_folder(), Report()
    home.mkdir(parents=True, exist_ok=True)
    with report.part("verify", "the shards in examples/data"):
        check_shards()
    tracker = MLflowTracker(None, home, "quickstart")
    with ray_session():
        run_on_ray(tracker, home, report)
    response = report.values["response"]
    console.print(lineage.trace(response, tracker, home), highlight=False)
    report.values["trace"] = f"bridgework trace {response}"
    conclude(report, home)


def run_on_ray(tracker: MLflowTracker, home: Path, report: Report) -> None:
    """Run the parts that need Ray: train, sweep, promote, evaluate, serve."""
    with report.part("train", "llava:quickstart: warm, align, instruct"):
        results = train(
            load("llava:quickstart"), home=home, run="quickstart", tracker=tracker, console=console
        )
        show_training(results)
    with report.part("sweep", "the bridge, its learning rate, and alpha of the mixture"):
        outcome = sweep(
            load_space("llava_bridge"),
            home=home,
            run="quickstart-sweep",
            tracker=tracker,
            console=console,
        )
        show_sweep(outcome)
        report.values["report"] = str(outcome.report)
    with report.part("promote", "the model that ranks held-out captions better"):
        champion = promote(tracker, results["instruct"], home)
        report.values |= {
            "model": champion.name,
            "version": champion.version,
            "alias": registry.CHAMPION,
        }
    with report.part("judge", "the champion, on drawings by another artist and on new concepts"):
        report.values |= evaluate(champion.artifact, home)
    with report.part("serve", "ask over HTTP with the openai client"):
        report.values |= ask(home)


def check_shards() -> None:
    for name in SETS:
        problems = verify(str(DATA / name))
        if problems:
            raise DataError(f"{DATA / name}: {problems[0]}. Fix: check the files out again")
        manifest = open_dataset(str(DATA / name)).manifest
        console.print(
            f"{name:18}{manifest.rows:6,} pairs  {manifest.license:32}  {manifest.digest[:12]}",
            highlight=False,
        )


def show_training(results: dict[str, StageResult]) -> None:
    table = Table("stage", "metric", "value", box=None, pad_edge=False)
    for stage, result in results.items():
        for key, value in result.metrics.items():
            if "." in key and not key.startswith("loss."):
                table.add_row(stage, key, f"{value:.3f}")
    console.print(table)


def show_sweep(outcome: Outcome) -> None:
    table = Table(
        "trial", "score", "status", "bridge", "peak_lr", "alpha", box=None, pad_edge=False
    )
    for row in outcome.rows:
        bridge, rate, alpha = row.changes.values()
        table.add_row(
            row.trial, f"{row.score or 0:.3f}", row.status, str(bridge), f"{rate:.2g}", f"{alpha:g}"
        )
    console.print(table)
    console.print(f"again: {outcome.command}", soft_wrap=True, highlight=False)


def promote(tracker: MLflowTracker, trained: StageResult, home: Path) -> Version:
    """Promote the trained model, then the sweep's best if it ranks better. Returns the champion."""
    first = registry.register(tracker, "llava", trained, {"run": "quickstart"})
    if not any(registry.CHAMPION in v.aliases for v in tracker.versions("llava")):
        promotion.promote(tracker, f"llava:{first.version}", home=home)
    try:
        done = promotion.promote(tracker, "llava@challenger", home=home, metric=GATE)
        console.print(
            f"champion: version {done.candidate}, the sweep's best: {done.reason}",
            highlight=False,
            soft_wrap=True,
        )
    except TrackingError as error:
        console.print(f"{error}", highlight=False, soft_wrap=True)
    return tracker.version("llava", registry.CHAMPION)


def evaluate(artifact: str, home: Path) -> dict[str, Any]:
    """Evaluate the champion and print its metrics next to chance."""
    pipeline = Pipeline.load(artifact)
    figures = {
        key: value
        for spec in EVALUATIONS
        for key, value in spec.run(pipeline, home).metrics.items()
    }
    table = Table("", "another artist's style", "new concepts", "chance", box=None, pad_edge=False)
    for name, key, chance in (
        ("right caption nearest of 300", "retrieval.image_to_text_r1", "retrieval.chance_r1"),
        ("right caption among the nearest 5", "retrieval.image_to_text_r5", "retrieval.chance_r5"),
        ("right caption likeliest of 20", "ranking.accuracy", "ranking.chance"),
    ):
        table.add_row(name, *(f"{figures[k]:.1%}" for k in (key, f"concepts_{key}", chance)))
    console.print(table)
    loss, shuffled = figures["heldout.loss"], figures["heldout.loss_shuffled"]
    console.print(
        f"held-out loss {loss:.2f} nats a token, {shuffled:.2f} with another image", highlight=False
    )
    return {
        "heldout_loss": loss,
        "heldout_loss_shuffled": shuffled,
        "score": figures["ranking.accuracy"],
        "chance": figures["ranking.chance"],
        "figures": figures,
    }


def ask(home: Path) -> dict[str, Any]:
    """Rank captions for held-out images, then ask about the one with the most certain caption.

    For that image, the likelihood of the language model and the nearest embedding select the same
    caption, if possible. The answer is one of the captions, because after minutes of training the
    model can rank captions but not write them.
    """
    held_out = list(open_dataset(str(DATA / "heldout_style")).samples())
    samples, captions = held_out[:: len(held_out) // IMAGES][:IMAGES], [s.text for s in held_out]
    with serving("embed", home) as address:
        ranked = [rank(address, sample, captions) for sample in samples]
        nearest = [classify(address, sample, captions) for sample in samples]
    table = Table(
        "true caption", "likeliest of 20", "nats above", "nearest of 20", box=None, pad_edge=False
    )
    certainty: list[tuple[bool, float, Sample]] = []
    for sample, (first, second, *_), near in zip(samples, ranked, nearest, strict=True):
        margin = first["score"] - second["score"]
        table.add_row(sample.text, first["candidate"], f"{margin:.1f}", near)
        certainty.append((first["candidate"] == near, margin, sample))
    console.print(table)
    best = max(certainty, key=lambda one: one[:2])[2]
    with serving("chat", home) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="local")
        image: Any = {"type": "image_url", "image_url": {"url": url(best)}}
        content: Any = [image, {"type": "text", "text": QUESTION}]
        answer = client.chat.completions.create(
            model="llava",
            messages=[{"role": "user", "content": content}],
            extra_body={"structured_outputs": {"choice": choices(best, captions)}},
        )
    text = answer.choices[0].message.content or ""
    console.print(f"{QUESTION}  [bold]{text}[/]  (true caption: {best.text})", highlight=False)
    return {"answer": text, "drawn": best.text, "response": answer.id}


@contextmanager
def serving(app: str, home: Path) -> Iterator[str]:
    """Serve an app on a free port, without a key, which is allowed on loopback only.

    Yields its URL.
    """
    args = {"model": "llava", "dev": "true", "home": str(home), "cpus": "0.5"}
    endpoint = launch.start(app, args, launch.AppAddress(port=launch.free_port()))
    yield endpoint.address
    endpoint.stop()


def rank(address: str, sample: Sample, captions: list[str]) -> list[dict[str, Any]]:
    """Return the captions of `choices` with their scores, likeliest first."""
    body = {
        "model": "llava",
        "image": url(sample),
        "candidates": choices(sample, captions),
        "question": QUESTION,
    }
    answer = httpx.post(f"{address}/v1/rank", json=body, timeout=120)
    answer.raise_for_status()
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def classify(address: str, sample: Sample, captions: list[str]) -> str:
    """Return the caption of `choices` whose embedding is nearest to the image's."""
    body = {
        "model": "llava",
        "image": url(sample),
        "labels": choices(sample, captions),
        "template": "{}",
    }
    answer = httpx.post(f"{address}/v1/classify", json=body, timeout=120)
    answer.raise_for_status()
    return str(answer.json()["data"][0]["label"])


def choices(sample: Sample, captions: list[str]) -> list[str]:
    """Return CANDIDATES captions: the sample's own, and others at equal distances."""
    others = [c for c in captions[:: len(captions) // CANDIDATES] if c != sample.text][
        : CANDIDATES - 1
    ]
    return [sample.text, *others]


def url(sample: Sample) -> str:
    """Return the image of a sample as a data: URL."""
    kind = (
        "webp"
        if sample.images[0][8:12] == b"WEBP"
        else "png"
        if sample.images[0][:4] == b"\x89PNG"
        else "jpeg"
    )
    return f"data:image/{kind};base64,{base64.b64encode(sample.images[0]).decode()}"


def conclude(report: Report, home: Path) -> None:
    """Write quickstart.json and print the summary."""
    values = report.values
    file = report.write(home)
    console.rule("[bold]summary[/]", align="left")
    lines = {
        "held-out loss": f"{values['heldout_loss']:.2f}, "
        f"with another image {values['heldout_loss_shuffled']:.2f}",
        "right caption of 20": f"{values['score']:.0%} in another artist's style, "
        f"chance {values['chance']:.0%}",
        "total time": f"{sum(report.seconds.values()):.0f} s",
        "results": str(file),
        "report of the sweep": str(values["report"]),
        "MLflow": f".venv/bin/mlflow ui --backend-store-uri sqlite:///{home}/mlflow.db",
    }
    for name, line in lines.items():
        console.print(f"{name:22}{line}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except BridgeworkError as error:
        console.print(f"[bold red]error[/]  {error}", soft_wrap=True)
        sys.exit(1)
