"""`bridgework`: one program for everything. Hyperparameters have no flags of their own, only `--set dotted.path=value`.

Heavy libraries are imported by the command that needs them, so that `bridgework --help` answers at once.
"""

import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from bridgework import storage
from bridgework.cli.curate import curate
from bridgework.cli.data import data, mixture, order
from bridgework.cli.models import ask, evaluate, export, importing
from bridgework.cli.options import changes, pairs
from bridgework.config import flat, override
from bridgework.data.catalog import home as home_folder
from bridgework.errors import BridgeworkError, Interrupted, ResourceError, TrackingError
from bridgework.ray_utils import TIMEOUT_S, ray_session
from bridgework.system import System, load, recipes, variants

if TYPE_CHECKING:
    from bridgework.tracking.mlflow_store import MLflowTracker

app = typer.Typer(
    help="Vision-language systems from raw pairs to a served endpoint.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(data, name="data")
app.add_typer(importing, name="import")
app.command()(curate)
app.command()(ask)
data.command()(order)
data.command()(mixture)
app.command()(export)
app.command("eval")(evaluate)
out, err = Console(), Console(stderr=True)

INTERRUPTED = 130  # the exit code of a run that was asked to stop: 128 + SIGINT, as shells have it
BY_SOURCE = ("samples.", "tokens.", "share.")  # metrics of which there is one for each source

Name = Annotated[
    str, typer.Argument(metavar="SYSTEM", help="llava, llava:v1, or a module of your own")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="change the recipe by dotted path"),
]
Tiny = Annotated[
    bool, typer.Option("--tiny", help="the same program at laptop size, on synthetic pairs")
]
Project = Annotated[str, typer.Option(help="the MLflow experiment")]
Model = Annotated[
    str, typer.Argument(help="llava, llava@challenger, llava:3, or an artifact's folder")
]


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    if debug:
        os.environ["BRIDGEWORK_DEBUG"] = "1"


@app.command()
def systems() -> None:
    """The systems, their stages at the paper's scale and what trains in each; and their variants."""
    from bridgework.training.estimate import parameter_counts

    whole = partial(Column, no_wrap=True)
    table = Table(
        whole("system"), whole("stage"), "trains", whole("trainable"), whole("frozen"), whole("steps x batch"),
        box=None, pad_edge=False, padding=(0, 1),
    )  # fmt: skip
    for name in recipes():
        for number, stage in enumerate(load(name).stages):
            globs = [k if v == 1 else f"{k} (lr x {v:g})" for k, v in stage.trains.items()]
            what = ", ".join(globs[:3]) + (f" and {len(globs) - 3} more" if len(globs) > 3 else "")
            size, budget = (
                parameter_counts(stage),
                f"{stage.budget.steps:,} x {stage.budget.batch:,}",
            )
            first = "" if number else name
            table.add_row(
                first, stage.name, what, millions(size.trainable), millions(size.frozen), budget
            )
    out.print(table)
    others = Table("", "also", show_header=False, box=None, pad_edge=False, padding=(0, 1))
    for name in recipes():
        if named := [f"{name}:{variant}" for variant in variants(name) if variant != "system"]:
            others.add_row("also", ", ".join(named))
    out.print(others)


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"


@app.command()
def show(system: Name, set_: Set = None, tiny: Tiny = False) -> None:
    """The resolved recipe, every dotted path of it, and how many parameters train."""
    from bridgework.training.estimate import parameter_counts

    resolved = _resolve(system, set_, tiny)
    out.print(
        f"{resolved.name} ({resolved.paper}), fingerprint {resolved.fingerprint()}", highlight=False
    )
    for path, value in flat(resolved).items():
        out.print(f"  {path} = {value}", highlight=False, soft_wrap=True)
    table = Table("stage", "trainable", "frozen", box=None, pad_edge=False)
    for stage in resolved.stages:
        count = parameter_counts(stage)
        table.add_row(stage.name, f"{count.trainable:,}", f"{count.frozen:,}")
    out.print(table)


@app.command()
def train(
    system: Name,
    stage: Annotated[
        list[str] | None, typer.Option(help="only this stage; repeat for several")
    ] = None,
    tiny: Tiny = False,
    set_: Set = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Ray Train workers; 0 trains in this process")
    ] = 1,
    readers: Annotated[int, typer.Option(min=1, help="Ray Data actors that read and decode")] = 1,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY|step:N[-M]", help="leave a sample or steps out, on record"),
    ] = None,
    run: Annotated[str | None, typer.Option(help="the run's name; the same name resumes")] = None,
    fork: Annotated[
        str | None,
        typer.Option(
            metavar="RUN[@STEP]",
            help="a new run from the newest checkpoint of RUN, with another recipe",
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            min=0, help="default: 1 where the cluster has GPUs or can start nodes that have, else 0"
        ),
    ] = None,
    resource_timeout: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="how long the workers' resources are waited for"
        ),
    ] = TIMEOUT_S,
    trust_checkpoints: Annotated[
        bool,
        typer.Option("--trust-checkpoints", help="sign the run's checkpoints with this home's key"),
    ] = False,
    start_over: Annotated[
        bool,
        typer.Option(
            "--start-over", help="begin a stage again where none of its checkpoints can be used"
        ),
    ] = False,
    project: Project = "bridgework",
) -> None:
    """Train a system, stage after stage. The same run again resumes, and reuses what is finished."""
    from bridgework.tracking import registry
    from bridgework.training.driver import train as run_training
    from bridgework.training.ray_train import RunOptions

    resolved = _resolve(system, set_, tiny)
    run = run or _run_name(
        f"{system.replace(':', '-').replace('.', '-')}{'-tiny' * tiny}", resolved
    )
    for name in stage or ():
        resolved[name]  # a wrong word is said before the tracker is opened
    tracker = _if_up(project)
    with ray_session() if workers else nullcontext():
        results = run_training(
            resolved,
            home=home_folder(),
            run=run,
            options=RunOptions(
                workers=workers,
                readers=readers,
                skip=tuple(skip or ()),
                gpus_per_worker=gpus_per_worker,
                resource_timeout_s=resource_timeout,
                trust_checkpoints=trust_checkpoints,
                start_over=start_over,
            ),
            stages=stage,
            tracker=tracker,
            console=err,
            fork=fork,
        )
    table = Table("stage", "figure", "value", box=None, pad_edge=False)
    for name, result in results.items():
        for key, value in result.metrics.items():
            if key.startswith(BY_SOURCE):
                continue  # MLflow has them
            table.add_row(name, key, f"{value:.4g}")
            name = ""
    out.print(table)
    last = results[list(results)[-1]]
    out.print(f"artifact  {last.artifact}", soft_wrap=True, highlight=False)
    if tracker and last.run_id and last.model_id:
        version = registry.register(tracker, resolved.name, last, {"run": run})
        out.print(f"model     {version.name}:{version.version}", highlight=False)


@app.command()
def sweep(
    space: Annotated[str, typer.Argument(help="a module of tune_spaces/, e.g. llava_bridge")],
    set_: Set = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="how many, instead of the space's own number")
    ] = None,
    run: Annotated[str | None, typer.Option(help="the sweep's name")] = None,
    project: Project = "bridgework",
) -> None:
    """Search the bridge and the mixture; the best trial is registered as `challenger`."""
    from bridgework.tuning import search
    from bridgework.tuning.space import load as load_space

    found = search.cap_concurrency(load_space(space), trials=trials)
    tracker = _if_up(project)
    with ray_session():
        outcome = search.sweep(
            found,
            home=home_folder(),
            run=run or f"sweep-{space}",
            changes=changes(set_),
            tracker=tracker,
            console=err,
        )
    table = Table(
        "trial", found.metric.name, "status", "seconds", *found.space, box=None, pad_edge=False
    )
    for row in outcome.rows:
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.changes.values()]
        score = "-" if row.score is None else f"{row.score:.3f}"
        table.add_row(row.trial, score, row.status, f"{row.seconds:.0f}", *values)
    out.print(table)
    out.print(f"again     {outcome.command}", soft_wrap=True, highlight=False)
    out.print(f"artifact  {outcome.artifact}", soft_wrap=True, highlight=False)
    if outcome.version:
        held = f" ({', '.join(outcome.version.aliases)})" if outcome.version.aliases else ""
        out.print(
            f"model     {outcome.version.name}:{outcome.version.version}{held}", highlight=False
        )
    if outcome.not_challenger:
        out.print(outcome.not_challenger, soft_wrap=True, highlight=False)


@app.command()
def promote(
    model: Model,
    metric: Annotated[
        str | None, typer.Option(help="refuse if it is no better by this figure")
    ] = None,
    lower: Annotated[
        bool | None,
        typer.Option(
            "--lower/--higher", help="which way is better, of a figure that no evaluation gives"
        ),
    ] = None,
    project: Project = "bridgework",
) -> None:
    """Make a registered version the champion; the one before keeps the alias `previous`."""
    from bridgework.tracking import registry

    done = registry.promote(_tracker(project), model, metric=metric, lower=lower)
    was = f", before it {done.before.version}" if done.before else ""
    against = (
        f" ({metric} {done.compared[0]:g} against {done.compared[1]:g})" if done.compared else ""
    )
    out.print(
        f"champion  {done.champion.name}:{done.champion.version}{was}{against}", highlight=False
    )


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="a registered model, e.g. llava")],
    project: Project = "bridgework",
) -> None:
    """Make the champion before this one champion again."""
    from bridgework.tracking import registry

    done = registry.rollback(_tracker(project), name)
    out.print(f"champion  {done.champion.name}:{done.champion.version}", highlight=False)


@app.command()
def serve(
    app_: Annotated[str, typer.Argument(metavar="APP", help="chat, embed or caption")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. model=llava replicas=2")
    ] = None,
    host: Annotated[str, typer.Option(help="the address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 to 65535")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="of the app, where one Ray serves several [default: APP]")
    ] = None,
    route_prefix: Annotated[str, typer.Option(help="the path of the app")] = "/",
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write a config for `serve deploy` instead of serving"),
    ] = None,
) -> None:
    """Serve a model over HTTP until Ctrl-C or SIGTERM; `model=NAME` is its champion."""
    from bridgework.serving import launch

    args = pairs(words, "model=llava")
    where = launch.Where(host=host, port=port, name=name, route_prefix=route_prefix)
    if write:
        launch.write(write, app_, args, where)
        out.print(f"wrote {write}", highlight=False)
        return
    endpoint = launch.start(app_, args, where)
    out.print(f"{app_} of {args['model']} answers at {endpoint.address}", highlight=False)
    if left := launch.wait(endpoint):
        err.print(
            f"{left} requests did not end in {endpoint.drain_s:g} s and were cut off",
            highlight=False,
        )


@app.command()
def trace(
    what: Annotated[
        str, typer.Argument(help="a response, deployment, model or run; with --uses a dataset")
    ],
    uses: Annotated[
        bool, typer.Option("--uses", help="the other way: everything that a dataset went into")
    ] = False,
) -> None:
    """Where an answer or a model comes from, back to the shards; or where a dataset went."""
    from bridgework.tracking import lineage as graph
    from bridgework.tracking.mlflow_store import MLflowReader

    follow = graph.uses if uses else graph.trace
    out.print(follow(what, MLflowReader(None, home_folder()), home_folder()), highlight=False)


@app.command()
def doctor() -> None:
    """Whether this machine can run bridgework, and what to do where it cannot."""
    from bridgework.cli.diagnostics import checks

    table = Table("", "check", "found", "advice", box=None, pad_edge=False)
    found = checks(home_folder())
    for check in found:
        table.add_row("ok" if check.ok else "no", check.name, check.found, check.advice)
    out.print(table)
    if not all(check.ok for check in found):
        raise typer.Exit(1)


# --- what commands share ---------------------------------------------------------------------------------------------


def _resolve(name: str, words: list[str] | None, tiny: bool) -> System:
    system = load(name)
    return override(system.tiny() if tiny else system, changes(words))


def _run_name(system: str, resolved: System) -> str:
    """The name of a run that was given none: by what it learns, so that it resumes with other options.

    An older version named it by all its fields; such a run is found again.
    """
    named, before = (
        f"{system}-{digest[:6]}" for digest in (resolved.identity(), resolved.fingerprint())
    )
    runs = home_folder() / "runs"
    return before if (runs / before).exists() and not (runs / named).exists() else named


def _tracker(project: str) -> "MLflowTracker":
    from bridgework.tracking.mlflow_store import MLflowTracker

    home_folder().mkdir(parents=True, exist_ok=True)
    return MLflowTracker(None, home_folder(), project)


def _if_up(project: str) -> "MLflowTracker | None":
    """The tracker, or None where it does not answer: it must not keep a run from starting."""
    try:
        return _tracker(project)
    except TrackingError as error:
        err.print(f"{error}; going on untracked: the same command later records it", soft_wrap=True)
        return None


def main() -> None:
    """The console script: one line for an error raised on purpose or by the machine, a traceback only with --debug."""
    sys.path.append(os.getcwd())  # tune_spaces/ and modules of one's own, as with `python -m`
    try:
        app(standalone_mode=True)
    except (BridgeworkError, MemoryError, OSError) as error:
        if os.environ.get("BRIDGEWORK_DEBUG"):
            raise
        if (
            isinstance(error, OSError)
            and not isinstance(error, BridgeworkError)
            and storage.disk_full(error)
        ):
            error = storage.full(Path(error.filename or home_folder()))
        said = (
            error
            if not isinstance(error, MemoryError)
            else ResourceError("out of memory; take a smaller batch")
        )
        err.print(
            f"[bold red]error[/]  {str(said).replace('[', chr(92) + '[')}",
            soft_wrap=True,
            highlight=False,
        )
        sys.exit(INTERRUPTED if isinstance(error, Interrupted) else 1)


if __name__ == "__main__":
    main()
