"""From data to a served model on a laptop, with pretrained weights: `make quickstart`.

verify shards -> warm: train the bridge -> sweep it -> align and instruct: the language model learns
to read the bridge -> promote -> judge on held-out drawings -> serve and ask -> trace the answer to
its shards. The results are printed, drawn (quickstart.png, quickstart.html) and written to
<home>/quickstart.json. Running it again (also as `python -m examples.quickstart`) reuses finished
parts.
"""

import argparse
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ray
import torch
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from bridgework.artifacts import StageResult
from bridgework.config import override
from bridgework.data.dataset import open_dataset, verify
from bridgework.data.samples import Sample
from bridgework.errors import DataError, TrackingError
from bridgework.evaluation import HeldOutLoss, Ranking, Retrieval
from bridgework.inference.pipeline import Pipeline
from bridgework.inference.preprocess import RememberingInputs
from bridgework.models import PrefixVLMConfig
from bridgework.ray_utils import ray_session
from bridgework.recipes.llava import QUICK_RANKING
from bridgework.serving import launch
from bridgework.system import EvalSpec, System, load
from bridgework.tracking import lineage, lineage_views, promotion, registry
from bridgework.tracking.mlflow_store import MLflowTracker
from bridgework.tracking.tracker import CHAMPION, Version
from bridgework.training.driver import train
from bridgework.training.options import RunOptions
from bridgework.tuning.search import Outcome, sweep
from bridgework.tuning.space import load as load_space
from examples.pictures import Card, Line, data_url, page, sheet
from examples.report import Report, console, escape, interval, lines, percent, run, shown

DATA = Path("examples/data")
SETS = ("clipart", "emoji", "heldout_clipart", "heldout_style", "heldout_concepts")
STYLE, CONCEPTS = f"{DATA}/heldout_style", f"{DATA}/heldout_concepts"
QUESTION = "What is in the picture?"
GATE = "ranking.accuracy"
ROWS = 300  # of each held-out set: all
RANKING = replace(QUICK_RANKING, dataset=STYLE, rows=ROWS)
# The evaluations of a dataset share its images. A process with one thread runs each of the groups.
STYLE_EVALUATIONS = (RANKING, Retrieval(dataset=STYLE, rows=ROWS))
CONCEPT_EVALUATIONS = (
    replace(RANKING, name="concepts_ranking", dataset=CONCEPTS),
    Retrieval(name="concepts_retrieval", dataset=CONCEPTS, rows=ROWS),
    HeldOutLoss(dataset=CONCEPTS, rows=ROWS),
)
# The drawings of the report are drawn by a seed before anything is trained, never by their result.
DRAWINGS, SEED, CANDIDATES = 12, 0, 20
ABOUT_S = {  # on 2 idle cores
    "verify": 5,
    "warm": 105,
    "sweep": 85,
    "align": 270,
    "instruct": 75,
    "judge": 145,
    "serve": 20,
}
TITLES = {
    "warm": "the bridge learns by contrast with the captions (Ray Train)",
    "align": "the language model learns to read the bridge (Ray Train)",
    "instruct": "it learns to answer a question about an image (Ray Train)",
}


@dataclass(frozen=True)
class Answered:
    """A held-out drawing with its 20 candidates, likeliest first, and its nearest caption."""

    sample: Sample
    ranked: list[tuple[str, float]]  # caption and its share of the likelihood of all 20
    nearest: str  # of all 300 captions, by the embeddings

    @property
    def card(self) -> Card:
        top = [
            Line(caption, f"{share:.0%}".replace("%", " %"), caption == self.sample.text)
            for caption, share in self.ranked[:3]
        ]
        near = Line(f"nearest of {ROWS}: {self.nearest}", right=self.nearest == self.sample.text)
        return Card(self.sample.images[0], self.sample.text, [*top, near])


def main(report: Report, seed: int) -> None:
    with report.part("verify", "the shards in examples/data", ABOUT_S["verify"]):
        held_out = check_shards()
        chosen = random.Random(SEED).sample(held_out, DRAWINGS)
    tracker = MLflowTracker(None, report.home, "quickstart")
    with ray_session():
        run_on_ray(tracker, report, seed, held_out, chosen)
    response = report.values["response"]
    report.values["trace"] = f"bridgework trace {response}"
    console.print()
    graph = lineage.trace(response, tracker, report.home)
    console.print(pruned(lineage_views.tree(graph)))
    console.print(f"[dim]complete: .venv/bin/{report.values['trace']}[/]", soft_wrap=True)
    conclude(report)


def run_on_ray(
    tracker: MLflowTracker,
    report: Report,
    seed: int,
    held_out: list[Sample],
    chosen: list[Sample],
) -> None:
    """Run the parts that need Ray: train, sweep, promote, judge, serve."""
    system = override(load("llava:quickstart"), {"stages.*.seed": seed})
    warm = train_stage(report, tracker, system, "warm")
    with report.part("sweep", "four other bridges (Ray Tune, Optuna)", ABOUT_S["sweep"]):
        outcome = sweep(
            load_space("quickstart_warm"),
            home=report.home,
            run="quickstart-sweep",
            tracker=tracker,
            console=Console(quiet=True),
        )
        system = choose(system, warm, outcome)
        report.values["report"] = str(outcome.report)
    train_stage(report, tracker, system, "align")
    last = train_stage(report, tracker, system, "instruct")
    champion = promote(tracker, last, report.home)
    report.values |= {
        "model": champion.name,
        "version": champion.version,
        "alias": CHAMPION,
    }
    with report.part("judge", "the model, on drawings that it never saw", ABOUT_S["judge"]):
        figures, answered = judge(champion.artifact, report.home, held_out, chosen)
        report.values |= figures
        show_answered(answered)
        for file in draw_report(report, answered):
            tracker.file(champion.run_id, file, "report")
    with report.part("serve", "the OpenAI client asks about the first drawing", ABOUT_S["serve"]):
        report.values |= ask(report.home, chosen[0], choices(chosen[0], held_out))


def check_shards() -> list[Sample]:
    """Verify every dataset; returns the held-out drawings of another artist."""
    table = Table("dataset", "pairs", "license", "digest", box=None, pad_edge=False)
    for name in SETS:
        problems = verify(str(DATA / name))
        if problems:
            raise DataError(f"{DATA / name}: {problems[0]}. Fix: check the files out again")
        manifest = open_dataset(str(DATA / name)).manifest
        table.add_row(name, f"{manifest.rows:,}", manifest.license, manifest.digest[:12])
    console.print(table)
    return list(open_dataset(STYLE).samples())


def train_stage(report: Report, tracker: MLflowTracker, system: System, stage: str) -> StageResult:
    """Train one stage as a part of the report."""
    with report.part(stage, TITLES[stage], ABOUT_S[stage], bar=False):
        result = train(
            system,
            home=report.home,
            run="quickstart",
            options=RunOptions(checkpoint_every=100),
            stages=[stage],
            tracker=tracker,
            console=console,
        )[stage]
        metrics = result.metrics
        figures = [f"loss {metrics['loss']:.2f}"]
        for evaluation in system[stage].evals:
            figures += figures_of(evaluation, metrics)
        console.print(f"[bold]{', '.join(figures)}[/]", soft_wrap=True)
        rest = shown(report.home / "runs" / "quickstart" / stage / "metrics.json")
        console.print(f"[dim]all {len(metrics)} figures: {rest}, and MLflow[/]", soft_wrap=True)
    return result


def figures_of(evaluation: Any, metrics: dict[str, float]) -> list[str]:
    """Return the main figures of an evaluation of a stage in words."""
    name = evaluation.name
    if isinstance(evaluation, HeldOutLoss):
        loss, gap = metrics[f"{name}.loss"], metrics[f"{name}.gap"]
        return [f"held-out loss {loss:.2f}, {gap:+.2f} with another image"]
    if isinstance(evaluation, Ranking):
        share = percent(metrics[f"{name}.accuracy"], evaluation.rows)
        return [f"right caption likeliest of {evaluation.candidates}: {share}"]
    if isinstance(evaluation, Retrieval):
        share = percent(metrics[f"{name}.image_to_text_r1"], evaluation.rows)
        return [f"right caption nearest of {evaluation.rows}: {share}"]
    return []


def choose(system: System, warm: StageResult, outcome: Outcome) -> System:
    """Print the trials; returns the system, which starts from the best one if it is clearly better.

    All are judged on clip art that neither training nor the final evaluation reads. The recipe
    stays unless a trial is above the recipe's 95 % interval, because the best of several trials is
    partly luck.
    """
    metric, best = "retrieval.image_to_text_r1", outcome.rows[0]
    table = Table("", "bridge", "peak_lr", "alpha", "nearest of 300", box=None, pad_edge=False)
    stage = system["warm"]
    assert isinstance(stage.model, PrefixVLMConfig)
    own = warm.metrics[metric]
    table.add_row(
        "recipe", "mlp", f"{stage.optim.peak_lr:.2g}", f"{stage.data.alpha:g}", percent(own, ROWS)
    )
    for number, row in enumerate(outcome.rows, 1):
        bridge, rate, alpha = row.changes.values()
        score = "-" if row.score is None else percent(row.score, ROWS)
        table.add_row(f"trial {number}", str(bridge), f"{rate:.2g}", f"{alpha:g}", score)
    console.print(table)
    if (best.score or 0.0) <= interval(own, ROWS)[1]:
        console.print("No trial is above the recipe's interval: the recipe stays as written.")
        return system
    console.print("The best trial is above the recipe's interval: the next stages start from it.")
    changes = {path.replace("stages.warm.", "stages.*."): v for path, v in best.changes.items()}
    kept = {path: v for path, v in changes.items() if not path.endswith("peak_lr")}
    changed = override(system, {**kept, "stages.align.starts_from": str(outcome.artifact)})
    return override(changed, {"stages.warm.model.bridge": stage.model.bridge})


def promote(tracker: MLflowTracker, trained: StageResult, home: Path) -> Version:
    """Register the model; it becomes champion if there is none, or if it is better by the gate."""
    version = registry.register(tracker, "llava", trained, {"run": "quickstart"})
    known = any(CHAMPION in v.aliases for v in tracker.versions("llava"))
    if CHAMPION not in tracker.version("llava", version.version).aliases:
        try:
            promotion.promote(
                tracker,
                f"llava:{version.version}",
                home=home,
                metric=GATE if known else None,
            )
        except TrackingError as error:
            console.print(f"{error}", soft_wrap=True, markup=False)
    champion = tracker.version("llava", CHAMPION)
    console.print(f"champion: {champion.name} version {champion.version}")
    return champion


def judge(
    artifact: str, home: Path, held_out: list[Sample], chosen: list[Sample]
) -> tuple[dict[str, Any], list[Answered]]:
    """Evaluate the champion on all held-out rows, and let it answer about the chosen drawings.

    Two Ray tasks with one thread each, because a forward pass over few tokens does not occupy two.
    Prints the figures next to chance, and returns them with the answers.
    """
    style = judge_style.remote(artifact, home, held_out, chosen)
    concepts = metrics_of.remote(CONCEPT_EVALUATIONS, artifact, home)
    (figures, answered), others = ray.get([style, concepts])
    return evaluated(figures | others), answered


@ray.remote(num_cpus=1)
def judge_style(
    artifact: str, home: Path, held_out: list[Sample], chosen: list[Sample]
) -> tuple[dict[str, float], list[Answered]]:
    """Return the metrics of another artist's drawings, and the answers about the chosen ones."""
    pipeline = loaded(artifact)
    figures = metrics(STYLE_EVALUATIONS, pipeline, home)
    return figures, list(answer(pipeline, home, held_out, chosen))


@ray.remote(num_cpus=1)
def metrics_of(specs: Sequence[EvalSpec], artifact: str, home: Path) -> dict[str, float]:
    return metrics(specs, loaded(artifact), home)


def metrics(specs: Sequence[EvalSpec], pipeline: Pipeline, home: Path) -> dict[str, float]:
    return {key: value for spec in specs for key, value in spec.run(pipeline, home).metrics.items()}


def loaded(artifact: str) -> Pipeline:
    """Return the model on one thread; it reads every image once."""
    torch.set_num_threads(1)
    pipeline = Pipeline.load(artifact)
    pipeline.inputs = RememberingInputs(pipeline.model, pipeline.stage)
    return pipeline


def evaluated(figures: dict[str, float]) -> dict[str, Any]:
    """Print the figures; returns them under the names of quickstart.json."""
    table = Table("", *HEADS, box=None, pad_edge=False)
    for row in figure_rows(figures):
        table.add_row(*row)
    console.print(table)
    score = figures["ranking.accuracy"]
    return {
        "heldout_loss": figures["heldout.loss"],
        "heldout_loss_shuffled": figures["heldout.loss_shuffled"],
        "score": score,
        "score_interval": interval(score, ROWS),
        "chance": figures["ranking.chance"],
        "figures": figures,
    }


HEADS = ("another artist's style", "new concepts", "chance")


def figure_rows(figures: dict[str, float]) -> list[list[str]]:
    """Return the table of the figures, in percent with 95 % intervals."""
    rows = []
    for name, key, chance in (
        ("right caption likeliest of 20", "ranking.accuracy", "ranking.chance"),
        ("right caption nearest of 300", "retrieval.image_to_text_r1", "retrieval.chance_r1"),
        ("right caption in the nearest 5", "retrieval.image_to_text_r5", "retrieval.chance_r5"),
    ):
        shares = [percent(figures[k], ROWS) for k in (key, f"concepts_{key}")]
        rows.append([name, *shares, percent(figures[chance])])
    loss, shuffled = figures["heldout.loss"], figures["heldout.loss_shuffled"]
    rows.append(["loss, nats per token", "", f"{loss:.2f}", f"{shuffled:.2f} (another image)"])
    return rows


def answer(
    pipeline: Pipeline, home: Path, held_out: list[Sample], chosen: Sequence[Sample]
) -> Iterator[Answered]:
    """Rank 20 captions for each chosen drawing, and find the nearest of all captions."""
    captions = [sample.text for sample in held_out]
    references = pipeline.inputs.encode_images(RANKING.references(pipeline, home))
    texts_CD = pipeline.embed_texts(captions)
    for sample in chosen:
        ranked = pipeline.rank(
            sample.images[0], choices(sample, held_out), QUESTION, references, RANKING.scoring
        )
        best = max(one.score for one in ranked)
        total = sum(math.exp(one.score - best) for one in ranked)
        image_D = pipeline.embed_images([sample.images[0]])[0]
        yield Answered(
            sample,
            [(one.candidate, math.exp(one.score - best) / total) for one in ranked],
            captions[int((texts_CD @ image_D).argmax())],
        )


def choices(sample: Sample, held_out: list[Sample]) -> list[str]:
    """Return 20 captions in random order: the sample's own and others, drawn by its key."""
    others = [other.text for other in held_out if other.text != sample.text]
    draw = random.Random(f"{SEED} {sample.key}")
    captions = [sample.text, *draw.sample(others, CANDIDATES - 1)]
    draw.shuffle(captions)
    return captions


def show_answered(answered: Sequence[Answered]) -> None:
    table = Table("drawn", "likeliest of 20", "", f"nearest of {ROWS}", box=None, pad_edge=False)
    for one in answered:
        (first, share), *_ = one.ranked
        table.add_row(
            one.sample.text,
            marked(first, one.sample.text),
            f"{share:.0%}".replace("%", " %"),
            marked(one.nearest, one.sample.text),
        )
    console.print()
    console.print(table)
    console.print(f"[dim]{DRAWINGS} drawings by a fixed seed, not by their result[/]")


def marked(text: str, true: str) -> str:
    return f"[green]✓ {text}[/]" if text == true else f"[red]✗ {text}[/]"


def draw_report(report: Report, answered: Sequence[Answered]) -> list[Path]:
    """Write the drawings and their answers as a PNG and as an HTML page; returns the files."""
    cards = [one.card for one in answered]
    title = "llava:quickstart on drawings by an artist that it never saw"
    text = (
        f"For each drawing, the three likeliest of {CANDIDATES} captions, by the log-likelihood "
        f"minus {RANKING.scoring.prior_weight} of that for training images, and the nearest of all "
        f"{ROWS}. The {DRAWINGS} drawings were drawn by a fixed seed before training. The figures "
        "are of all held-out rows, with 95 % intervals."
    )
    png, html = report.home / "quickstart.png", report.home / "quickstart.html"
    sheet(title, cards).save(png)
    rows = figure_rows(report.values["figures"])
    html.write_text(page(title, text, ["", *HEADS], rows, cards))
    return [png, html]


def ask(home: Path, sample: Sample, captions: list[str]) -> dict[str, Any]:
    """Ask the served model about a drawing; its answer is one of the captions.

    After minutes of training the model can choose a caption, but not write a good one.
    """
    with serving("chat", home) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="local")
        image: Any = {"type": "image_url", "image_url": {"url": data_url(sample.images[0])}}
        content: Any = [image, {"type": "text", "text": QUESTION}]
        answer = client.chat.completions.create(
            model="llava",
            messages=[{"role": "user", "content": content}],
            extra_body={"structured_outputs": {"choice": captions}},
        )
    text = answer.choices[0].message.content or ""
    console.print(f"{QUESTION}  [bold]{text}[/]  (drawn: {sample.text})")
    return {"answer": text, "drawn": sample.text, "response": answer.id}


def pruned(tree: Tree) -> Tree:
    """Return a trace with models, stages, datasets and licenses alone, and with short paths."""
    text = str(tree.label).replace(f"{Path.cwd()}/", "")
    short = Tree(escape(text), hide_root=tree.hide_root)
    for child in tree.children:
        if str(child.label).startswith(TRACED):
            short.children.append(pruned(child))
    return short


TRACED = ("response", "deployment", "model", "weights", "stage", "dataset", "license")


@contextmanager
def serving(app: str, home: Path) -> Iterator[str]:
    """Serve an app on a free port, without a key, which is allowed on loopback only.

    Yields its URL.
    """
    args = {"model": "llava", "dev": "true", "home": str(home), "cpus": "0.5"}
    endpoint = launch.start(app, args, launch.AppAddress(port=launch.free_port()))
    yield endpoint.address
    endpoint.stop()


def conclude(report: Report) -> None:
    """Write quickstart.json, and print what was learned and how to go on."""
    values, home = report.values, report.home
    file = report.write()
    console.print()
    console.rule("[bold]summary[/]", align="left")
    figures = values["figures"]
    mlflow = f".venv/bin/mlflow ui --backend-store-uri sqlite:///{shown(home / 'mlflow.db')}"
    lines(
        {
            "learned": f"right caption likeliest of 20: {percent(values['score'], ROWS)} in "
            f"another artist's style, {percent(figures['concepts_ranking.accuracy'], ROWS)} for "
            f"new concepts, chance {percent(values['chance'])}",
            "time": f"{sum(report.seconds.values()) / 60:.1f} minutes",
            "drawings": f"{shown(home / 'quickstart.html')}, {shown(home / 'quickstart.png')}",
            "sweep": shown(Path(values["report"])),
            "results": shown(file),
            "MLflow": f"{mlflow}  (then http://127.0.0.1:5000)",
            "playground": ".venv/bin/bridgework serve chat model=llava dev=true  "
            "(then http://127.0.0.1:8000)",
        }
    )
    console.print("\n[bold]next[/]")
    for command in (
        "show llava:quickstart",
        "train llava:quickstart --run longer --set stages.align.budget.steps=1000",
        "sweep llava_bridge --trials 8",
    ):
        console.print(f"  .venv/bin/bridgework {command}", soft_wrap=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of training; 0: as in the recipe")
    run("quickstart", partial(main, seed=parser.parse_args().seed))
