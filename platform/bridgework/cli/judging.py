"""Commands that judge models: `eval`, `compare`, `register`, `promote`, `rollback`, `history`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from bridgework.cli.options import MODEL, Model, Project
from bridgework.data.catalog import home
from bridgework.errors import SpecError

if TYPE_CHECKING:
    from bridgework.evaluation.base import Figure, Result
    from bridgework.evaluation.gate import GateCheck
    from bridgework.inference.pipeline import Pipeline
    from bridgework.tracking.mlflow_store import MLflowTracker
    from bridgework.tracking.promotion import PromotionDecision

out, err = Console(), Console(stderr=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Registered model, e.g. llava.")]
On = Annotated[
    list[str] | None,
    typer.Option(
        "--on",
        metavar="KIND:DATASET",
        help="Run this evaluation, e.g. vqa:vqav2-val. Repeat for several.",
        show_default="those of the model's stage",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME.FIELD=VALUE",
        help="Change a field of an evaluation, e.g. vqa.rows=200. Repeat for several.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def evaluate(
    model: Model,
    on: On = None,
    set_: Set = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write every answer as a line of JSON, as lmms-eval does."
        ),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Evaluate again with int8 weights, and print the differences."),
    ] = False,
    json_: Json = False,
    project: Project = "bridgework",
) -> None:
    """Evaluate a model; figures, rows and images are kept in <home>/evals and in MLflow."""
    from bridgework.inference.pipeline import Pipeline
    from bridgework.tracking import evaluations
    from bridgework.tracking.mlflow_store import artifact_of

    artifact = artifact_of(model, home())
    chosen = _evaluations(model, artifact, on, set_)
    pipeline = Pipeline.load(artifact)
    done = evaluations.evaluate(
        artifact,
        chosen,
        home(),
        tracker=_tracker(project),
        pipeline=pipeline,
        say=_report,
    )
    if samples is not None:
        lines = [line for result, _ in done for line in _samples(result)]
        samples.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
        _report(f"samples   {samples}, {len(lines)} answers")
    figures = [figure for result, _ in done for figure in result.figures]
    if json_:
        out.print_json(data={figure.name: _figure_json(figure) for figure in figures})
        return
    names = [figure.name for figure in figures]
    table = figures_table(names, "metric", "value", "95 % interval", "n", "better")
    for figure in figures:
        table.add_row(
            figure.name, f"{figure.value:.4g}", *interval_cells(figure), figure.better or "-"
        )
    out.print(table)
    if int8:
        out.print(_int8_table(pipeline, chosen, [result for result, _ in done]))


def _int8_table(pipeline: "Pipeline", specs: Sequence[Any], before: Sequence["Result"]) -> Table:
    """Quantize the model of a pipeline; returns its figures next to those before, paired by row."""
    from bridgework.evaluation.statistics import difference
    from bridgework.inference.quantization import quantize

    sizes = [size / 2**20 for size in quantize(pipeline.model)]
    _report(f"language model: {sizes[0]:.1f} MiB, {sizes[1]:.1f} MiB with int8")
    table = Table("metric", "value", "int8", "difference", "95 % interval", box=None)
    for spec, first in zip(specs, before, strict=True):
        second = spec.run(pipeline, home())
        for name, value in first.metrics.items():
            interval = "-"
            if name in first.rows and name in second.rows:
                gap = difference(first.rows[name], second.rows[name])
                interval = f"\\[{gap.low:.2g}, {gap.high:.2g}]"
            new = second.metrics[name]
            table.add_row(name, f"{value:.4g}", f"{new:.4g}", f"{new - value:+.2g}", interval)
    return table


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help=MODEL)],
    second: Annotated[str, typer.Argument(metavar="B", help=MODEL)],
    on: On = None,
    set_: Set = None,
    json_: Json = False,
    project: Project = "bridgework",
) -> None:
    """Compare two models on the same rows: paired differences, p, and the rows that would decide.

    Stored evaluations are used; missing ones are run.
    """
    from bridgework.evaluation.statistics import difference
    from bridgework.tracking.mlflow_store import artifact_of
    from bridgework.tracking.promotion import stored_or_run

    artifacts = [artifact_of(model, home()) for model in (first, second)]
    chosen = _evaluations(first, artifacts[0], on, set_)
    tracker = _tracker(project)
    one, other = (
        stored_or_run(artifact, chosen, home(), tracker=tracker, say=_report)
        for artifact in artifacts
    )
    found = {
        name: (rows, record.rows[name], difference(rows, record.rows[name]), own.better[name])
        for own, record in zip(one, other, strict=True)
        for name, rows in own.rows.items()
        if own.better[name] is not None and name in record.rows
    }
    if json_:
        out.print_json(
            data={
                name: {"a": a.mean, "b": b.mean, **vars(gap), "better": better}
                for name, (a, b, gap, better) in found.items()
            }
        )
        return
    table = figures_table(
        found, "metric", "A", "B", "B - A", "95 % interval", "p", "n", "rows to decide", "better"
    )
    for name, (a, b, gap, better) in found.items():
        table.add_row(
            name,
            f"{a.mean:.4g}",
            f"{b.mean:.4g}",
            f"{gap.value:+.4g}",
            f"[{gap.low:.4g}, {gap.high:.4g}]".replace("[", r"\["),
            f"{gap.p:.2g}",
            f"{gap.n:,}",
            "-" if gap.rows_needed is None else f"{gap.rows_needed:,}",
            better,
        )
    out.print(table)


def register(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Artifact, e.g. of `bridgework import hf`.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model, e.g. my-blip.")],
    project: Project = "bridgework",
) -> None:
    """Register an artifact, e.g. an imported model, so that it can be promoted and served."""
    from bridgework.tracking import registry
    from bridgework.tracking.mlflow_store import MLflowTracker

    version = registry.register_folder(MLflowTracker(None, home(), project), name, folder)
    out.print(f"model     {version.name}:{version.version}", highlight=False)


def promote(
    model: Model,
    gate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Gate file: which figures must improve, and which must not get worse.",
            show_default="first figure of the stage improves, the others are guarded",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Require only that this figure is better.", show_default="the gate"),
    ] = None,
    force: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="Promote without a gate; the reason is on record."),
    ] = None,
    json_: Json = False,
    project: Project = "bridgework",
) -> None:
    """Make a version the champion if it passes the gate; every decision is recorded."""
    from bridgework import api
    from bridgework.tracking.promotion import NotPromoted

    try:
        decision = api.promote(
            model, gate=gate, metric=metric, force=force, project=project, say=_report
        )
    except NotPromoted as refused:
        _print_decision(refused.decision, json_)
        raise
    _print_decision(decision, json_)


def rollback(
    name: Name,
    reason: Annotated[str, typer.Option(help="Reason, which is kept on record.")] = "",
    project: Project = "bridgework",
) -> None:
    """Make the champion before the present one the champion; repeated, it goes further back."""
    from bridgework.tracking import promotion
    from bridgework.tracking.mlflow_store import MLflowTracker

    done = promotion.rollback(MLflowTracker(None, home(), project), name, reason, home=home())
    out.print(f"champion  {name}:{done.candidate}, instead of {done.champion}", highlight=False)


def history(name: Name, json_: Json = False, project: Project = "bridgework") -> None:
    """List the decisions about a model, oldest first."""
    from bridgework.tracking import promotion
    from bridgework.tracking.mlflow_store import MLflowTracker

    decisions = promotion.history(MLflowTracker(None, home(), project), name)
    if json_:
        out.print_json(data=[vars(decision) | {"checks": None} for decision in decisions])
        return
    table = Table(
        "at", "by", "decision", "version", "before it", "reason", box=None, pad_edge=False
    )
    for one in decisions:
        table.add_row(
            one.at[:19].replace("T", " "), one.by, one.verdict, one.candidate,
            one.champion or "-", one.reason.replace("[", r"\["),
        )  # fmt: skip
    out.print(table)


def _evaluations(model: str, artifact: str, on: list[str] | None, set_: list[str] | None) -> Any:
    """Return the evaluations of --on, or of the model's stage, with --set. Raises SpecError."""
    from bridgework.evaluation import kinds
    from bridgework.tracking.promotion import stage_of

    chosen = tuple(kinds.parse(argument) for argument in on or ())
    stage = stage_of(artifact)
    evaluations = kinds.assign(kinds.Evaluations(evals=chosen or stage.evals), set_)
    if not evaluations.evals:
        raise SpecError(
            f"stage {stage.name} of {model} has no evaluations. "
            "Fix: add some to its recipe's `evals`, or give --on KIND:DATASET, "
            f"where KIND is one of {', '.join(kinds.kinds())}"
        )
    return evaluations.evals


def _tracker(project: str) -> "MLflowTracker | None":
    from bridgework import api

    return api.open_tracker(project, home(), err)


def _report(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def interval_cells(figure: "Figure") -> tuple[str, str]:
    """Return the interval and the number of rows of a figure as cells."""
    found = figure.interval
    if found is None:
        return "-", "-"
    if found.clusters < 2:
        return "one image", f"{found.n:,}"
    return rf"\[{found.low:.4g}, {found.high:.4g}]", f"{found.n:,}"


def _figure_json(figure: "Figure") -> dict[str, Any]:
    found = None if figure.interval is None else vars(figure.interval)
    return {"value": figure.value, "better": figure.better, "interval": found}


def _samples(result: "Result") -> Iterator[Mapping[str, Any]]:
    """Yield the answers of an evaluation in the fields of lmms-eval's samples files."""
    places = {
        metric: dict(zip(rows.keys, rows.values.tolist(), strict=True))
        for metric, rows in result.rows.items()
        if result.better.get(metric) is not None
    }
    for number, answer in enumerate(result.answers):
        target = answer.target[0] if len(answer.target) == 1 else str(list(answer.target))
        yield {
            "doc_id": number,
            "key": answer.key,
            "input": answer.question,
            "target": target,
            "filtered_resps": answer.response,
            **{
                metric: values[answer.key]
                for metric, values in places.items()
                if answer.key in values
            },
        }


def _print_decision(decision: "PromotionDecision", json_: bool) -> None:
    if json_:
        checks = [vars(check) for check in decision.checks]
        out.print_json(data=vars(decision) | {"checks": checks})
        return
    if decision.checks:
        names = [check.figure for check in decision.checks]
        table = figures_table(
            names, "figure", "must", "new", "champion", "difference", "95 % interval", "n", "result"
        )
        for check in decision.checks:
            table.add_row(*_cells(check))
        out.print(table)
    if decision.changed:
        before = f", before it {decision.champion}" if decision.champion else ""
        out.print(f"champion  {decision.model}:{decision.candidate}{before}", highlight=False)


def figures_table(names: Iterable[str], first: str, *heads: str) -> Table:
    """Return a table whose first column has the complete names, also on 80 columns."""
    longest = max(map(len, names), default=0)
    return Table(Column(first, min_width=longest), *heads, box=None, pad_edge=False)


def _cells(check: "GateCheck") -> tuple[str, ...]:
    must = {
        "improve": "improve",
        "guard": f"not lose {check.margin or 0:g}",
        "parity": "be equal",
    }[check.rule]
    numbers = ("-", "-", "-", "-", "-")
    if check.difference is not None:
        numbers = (
            f"{check.new:.4g}", f"{check.old:.4g}", f"{check.difference:+.4g}",
            rf"\[{check.low:.4g}, {check.high:.4g}]", f"{check.n:,}",
        )  # fmt: skip
    reason = check.reason.replace("[", r"\[")
    return (check.figure, must, *numbers, f"{check.outcome}: {reason}")
