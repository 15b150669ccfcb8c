"""The `bridgework` command. Hyperparameters have no flags of their own, only `--set PATH=VALUE`.

Heavy libraries are imported by the command that needs them, so that `bridgework --help` is fast.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from bridgework import storage
from bridgework.cli import completion
from bridgework.cli.curate import curate
from bridgework.cli.data import data, mixture, order
from bridgework.cli.models import ask, evaluate, export, importing
from bridgework.cli.options import changes, pairs
from bridgework.config import flat, override
from bridgework.data.catalog import home as home_folder
from bridgework.errors import BridgeworkError, Interrupted, ResourceError, SpecError
from bridgework.ray_utils import TIMEOUT_S
from bridgework.system import System, load, recipes, variants

app = typer.Typer(
    help="Train, evaluate and serve vision-language systems on Ray. Change any field of a recipe "
    "with --set PATH=VALUE; `bridgework show SYSTEM` lists the paths.",
    no_args_is_help=True,
)
out, err = Console(), Console(stderr=True)

# Panels of `bridgework --help`, in the order of their first command.
DATA, TRAIN, EVALUATE, SERVE = "Data", "Training", "Evaluation and conversion", "Serving"
MACHINE = "This machine"

INTERRUPTED = 130  # exit code of a run that a signal stopped: 128 + SIGINT, as in shells
BY_SOURCE = ("samples.", "tokens.", "share.")  # prefixes of metrics with one value per source

Name = Annotated[
    str,
    typer.Argument(
        metavar="SYSTEM",
        help="Recipe: llava, llava:v1, or the path of your module.",
        autocompletion=completion.systems,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a field of the recipe by its dotted path, e.g. "
        "stages.align.optim.peak_lr=3e-4. Repeat for several.",
        autocompletion=completion.paths,
    ),
]
Tiny = Annotated[
    bool, typer.Option("--tiny", help="Use the recipe at laptop size, on synthetic pairs.")
]
Project = Annotated[str, typer.Option(help="MLflow experiment to record to.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Registered model (llava, llava@challenger, llava:3) or the folder of an artifact.",
    ),
]


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["BRIDGEWORK_DEBUG"] = "1"


app.command(rich_help_panel=DATA)(curate)
app.add_typer(data, name="data", rich_help_panel=DATA)
data.command()(order)
data.command()(mixture)


@app.command(rich_help_panel=TRAIN)
def systems() -> None:
    """List the systems: their stages at the paper's scale, trainable parameters and variants."""
    from bridgework.training.estimate import parameter_counts

    column = partial(Column, no_wrap=True)
    table = Table(
        column("system"), column("stage"), "trains", column("trainable"), column("frozen"),
        column("steps x batch"), box=None, pad_edge=False, padding=(0, 1),
    )  # fmt: skip
    for name in recipes():
        for number, stage in enumerate(load(name).stages):
            globs = [k if v == 1 else f"{k} (lr x {v:g})" for k, v in stage.trains.items()]
            more = f" and {len(globs) - 3} more" if len(globs) > 3 else ""
            count = parameter_counts(stage)
            table.add_row(
                "" if number else name,
                stage.name,
                ", ".join(globs[:3]) + more,
                _millions(count.trainable),
                _millions(count.frozen),
                f"{stage.budget.steps:,} x {stage.budget.batch:,}",
            )
    out.print(table)
    others = Table("", "also", show_header=False, box=None, pad_edge=False, padding=(0, 1))
    for name in recipes():
        if named := [f"{name}:{variant}" for variant in variants(name) if variant != "system"]:
            others.add_row("also", ", ".join(named))
    out.print(others)


@app.command(rich_help_panel=TRAIN)
def show(system: Name, set_: Set = None, tiny: Tiny = False) -> None:
    """Print the resolved recipe with the dotted path of every field, and the parameter counts."""
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


@app.command(rich_help_panel=TRAIN)
def train(
    system: Name,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="Train only this stage. Repeat for several.",
            show_default="all stages",
            autocompletion=completion.stages,
        ),
    ] = None,
    tiny: Tiny = False,
    set_: Set = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Ray Train workers; 0 trains in this process.")
    ] = 1,
    readers: Annotated[
        int, typer.Option(min=1, help="Ray Data actors that read and decode samples.")
    ] = 1,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY|step:N[-M]",
            help="Skip a sample or steps; recorded in the run. Repeat for several.",
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="Name of the run; the same name resumes it.",
            show_default="derived from the recipe",
        ),
    ] = None,
    fork: Annotated[
        str | None,
        typer.Option(
            metavar="RUN[@STEP]",
            help="Start a new run from a checkpoint of RUN, with another recipe. "
            "Without @STEP, from the newest checkpoint.",
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GPUs of each worker.",
            show_default="1 if the cluster has or can start GPU nodes, else 0",
        ),
    ] = None,
    resource_timeout: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="Time to wait for the resources of the workers."
        ),
    ] = TIMEOUT_S,
    trust_checkpoints: Annotated[
        bool,
        typer.Option(
            "--trust-checkpoints", help="Sign the checkpoints of the run with this home's key."
        ),
    ] = False,
    start_over: Annotated[
        bool,
        typer.Option(
            "--start-over", help="Restart a stage if none of its checkpoints can be loaded."
        ),
    ] = False,
    project: Project = "bridgework",
) -> None:
    """Train the stages of a system in order. Run again, it resumes and reuses finished stages."""
    from bridgework import api
    from bridgework.training.options import RunOptions
    from bridgework.training.run_dir import default_name

    resolved = _resolve(system, set_, tiny)
    prefix = system.replace(":", "-").replace(".", "-") + "-tiny" * tiny
    results = api.train(
        resolved,
        stages=stage,
        workers=workers,
        run=run or default_name(prefix, resolved, home_folder()),
        options=RunOptions(
            readers=readers,
            skip=tuple(skip or ()),
            gpus_per_worker=gpus_per_worker,
            resource_timeout_s=resource_timeout,
            trust_checkpoints=trust_checkpoints,
            start_over=start_over,
        ),
        fork=fork,
        project=project,
        console=err,
    )
    table = Table("stage", "metric", "value", box=None, pad_edge=False)
    for name, result in results.items():
        for key, value in result.metrics.items():
            if key.startswith(BY_SOURCE):
                continue  # recorded in MLflow
            table.add_row(name, key, f"{value:.4g}")
            name = ""
    out.print(table)
    last = results[list(results)[-1]]
    out.print(f"artifact  {last.artifact}", soft_wrap=True, highlight=False)
    if last.version:
        out.print(f"model     {last.version}", highlight=False)


@app.command(rich_help_panel=TRAIN)
def sweep(
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE", help="Search space: a module of tune_spaces/, e.g. llava_bridge."
        ),
    ],
    set_: Set = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Number of trials.", show_default="set by the space")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(help="Name of the sweep.", show_default="sweep-SPACE"),
    ] = None,
    project: Project = "bridgework",
) -> None:
    """Search hyperparameters and register the best trial, as `challenger` if it is better."""
    from bridgework import api
    from bridgework.tuning.space import load as load_space

    loaded = load_space(space)
    outcome = api.sweep(
        loaded,
        changes=changes(set_),
        trials=trials,
        run=run or f"sweep-{space}",
        project=project,
        console=err,
    )
    table = Table(
        "trial", loaded.metric.name, "status", "seconds", *loaded.space, box=None, pad_edge=False
    )
    for row in outcome.rows:
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.changes.values()]
        score = "-" if row.score is None else f"{row.score:.3f}"
        table.add_row(row.trial, score, row.status, f"{row.seconds:.0f}", *values)
    out.print(table)
    out.print(f"again     {outcome.command}", soft_wrap=True, highlight=False)
    out.print(f"artifact  {outcome.artifact}", soft_wrap=True, highlight=False)
    if outcome.version:
        aliases = f" ({', '.join(outcome.version.aliases)})" if outcome.version.aliases else ""
        out.print(
            f"model     {outcome.version.name}:{outcome.version.version}{aliases}", highlight=False
        )
    if outcome.not_challenger:
        out.print(outcome.not_challenger, soft_wrap=True, highlight=False)


app.command("eval", rich_help_panel=EVALUATE)(evaluate)
app.command(rich_help_panel=EVALUATE)(ask)
app.command(rich_help_panel=EVALUATE)(export)
app.add_typer(importing, name="import", rich_help_panel=EVALUATE)


@app.command(rich_help_panel=SERVE)
def promote(
    model: Model,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Promote only if the version is better by this metric.",
            show_default="no comparison",
        ),
    ] = None,
    lower: Annotated[
        bool | None,
        typer.Option(
            "--lower/--higher",
            help="Direction of a metric that no evaluation of the recipe declares.",
        ),
    ] = None,
    project: Project = "bridgework",
) -> None:
    """Make a registered version the champion; the old champion gets the alias `previous`."""
    from bridgework import api

    done = api.promote(model, metric=metric, lower=lower, project=project)
    before = f", before it {done.before.version}" if done.before else ""
    compared = (
        f" ({metric} {done.compared[0]:g} against {done.compared[1]:g})" if done.compared else ""
    )
    out.print(
        f"champion  {done.champion.name}:{done.champion.version}{before}{compared}", highlight=False
    )


@app.command(rich_help_panel=SERVE)
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Registered model, e.g. llava.")],
    project: Project = "bridgework",
) -> None:
    """Make the previous champion the champion again; the two swap their aliases."""
    from bridgework.tracking import registry
    from bridgework.tracking.mlflow_store import MLflowTracker

    done = registry.rollback(MLflowTracker(None, home_folder(), project), name)
    out.print(f"champion  {done.champion.name}:{done.champion.version}", highlight=False)


@app.command(rich_help_panel=SERVE)
def serve(
    app_: Annotated[str, typer.Argument(metavar="APP", help="App: chat, embed or caption.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Arguments of the app, e.g. model=llava replicas=2. model=NAME is the champion.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on, 0 to 65535.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the app, if one Ray serves several.", show_default="APP"),
    ] = None,
    route_prefix: Annotated[str, typer.Option(help="URL path of the app.")] = "/",
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a config for `serve deploy` instead of serving."),
    ] = None,
) -> None:
    """Serve a model over HTTP until Ctrl-C or SIGTERM."""
    from bridgework.serving import launch

    args = pairs(arguments, "model=llava")
    address = launch.AppAddress(host=host, port=port, name=name, route_prefix=route_prefix)
    if write:
        launch.write_config(write, app_, args, address)
        out.print(f"wrote {write}", highlight=False)
        return
    endpoint = launch.start(app_, args, address)
    out.print(f"{app_} of {args['model']} answers at {endpoint.address}", highlight=False)
    if cancelled := launch.wait(endpoint):
        err.print(
            f"{cancelled} requests did not end in {endpoint.drain_s:g} s and were cancelled",
            highlight=False,
        )


@app.command(rich_help_panel=SERVE)
def trace(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A response, deployment, model, run, artifact, dataset or digest; "
            "with --uses also a shard or the key of a sample.",
        ),
    ],
    uses: Annotated[
        bool,
        typer.Option("--uses", help="List everything that was derived from it instead."),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print nodes and edges as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with the graph instead.")
    ] = None,
) -> None:
    """Trace an answer, a model or a run back to its datasets, or a dataset to its models."""
    from bridgework.tracking import lineage, lineage_views
    from bridgework.tracking.mlflow_store import MLflowReader

    if html is not None and html.is_dir():
        raise SpecError(
            f"--html {html} is a folder; give the name of a file, e.g. {html / 'lineage.html'}"
        )
    follow = lineage.uses if uses else lineage.trace
    graph = follow(subject, MLflowReader(None, home_folder()), home_folder())
    if json_:
        out.print_json(data=lineage_views.to_json(graph))
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(lineage_views.page(graph), encoding="utf-8")
        (err if json_ else out).print(html, soft_wrap=True)
    elif not json_:
        out.print(lineage_views.tree(graph), highlight=False)


@app.command(rich_help_panel=EVALUATE)
def reproduce(
    subject: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="Name or id of a run, or llava, llava:3.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what is missing or differs here.")
    ] = False,
    run: Annotated[
        str | None, typer.Option(help="Name of the new run.", show_default="reproduce-ID")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Ray Train workers.", show_default="as recorded")
    ] = None,
) -> None:
    """Train a recorded model again from MLflow alone and compare the losses; exits 1 if they differ."""
    from bridgework.reproduction import read_record
    from bridgework.reproduction import reproduce as train_again

    record = read_record(subject)
    for dataset in record.missing:
        err.print(f"missing  dataset {dataset.name} {dataset.digest[:12]}", soft_wrap=True)
    for tag, then, now in record.differs:
        err.print(
            f"differs  {tag}: then {then or 'unknown'}; now {now or 'unknown'}", soft_wrap=True
        )
    if dry_run:
        if record.missing:
            raise typer.Exit(1)
        return
    results = train_again(record, run=run, workers=workers)
    table = Table("stage", "steps", "equal losses", "largest difference", "weights", box=None)
    for result in results:
        table.add_row(
            result.stage,
            f"{result.steps:,}",
            f"{result.equal:,}",
            f"{result.largest:.3g}",
            "equal" if result.same_weights else "differ",
        )
    out.print(table)
    if not all(result.exact for result in results):
        raise typer.Exit(1)


@app.command(rich_help_panel=SERVE)
def sync() -> None:
    """Post the metrics of earlier runs that the tracker does not have yet."""
    from bridgework.tracking.mlflow_store import MLflowTracker
    from bridgework.training.run_tracking import post_waiting

    tracker = MLflowTracker(None, home_folder(), "bridgework")
    posted, left = post_waiting(tracker, home_folder(), timeout_s=600.0)
    out.print(f"{posted:,} points posted, {left:,} left", highlight=False)
    if left:
        raise typer.Exit(1)


@app.command(rich_help_panel=MACHINE)
def doctor() -> None:
    """Check that this machine can run bridgework, and print a fix for each failed check."""
    from bridgework.cli.diagnostics import checks

    table = Table("", "check", "found", "advice", box=None, pad_edge=False)
    results = checks(home_folder())
    for check in results:
        table.add_row("ok" if check.ok else "no", check.name, check.found, check.advice)
    out.print(table)
    if not all(check.ok for check in results):
        raise typer.Exit(1)


# --- helpers


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"


def _resolve(name: str, assignments: list[str] | None, tiny: bool) -> System:
    system = load(name)
    return override(system.tiny() if tiny else system, changes(assignments))


def main() -> None:
    """Run the console script. An expected error is one line, with a traceback only with --debug."""
    sys.path.append(os.getcwd())  # for tune_spaces/ and your own modules, as with `python -m`
    try:
        app(standalone_mode=True)
    except Exception as error:
        if storage.is_of_a_client(error):
            error = storage.explained(error, str(home_folder()))
        expected = isinstance(error, BridgeworkError | MemoryError | OSError)
        if not expected or os.environ.get("BRIDGEWORK_DEBUG"):
            raise
        if (
            isinstance(error, OSError)
            and not isinstance(error, BridgeworkError)
            and storage.disk_full(error)
        ):
            error = storage.full(storage.locate(error.filename or home_folder()))
        if isinstance(error, MemoryError):
            error = ResourceError("out of memory. Fix: use a smaller batch")
        escaped = str(error).replace("[", r"\[")  # not rich markup
        err.print(
            f"[bold red]error[/]  {escaped}",
            soft_wrap=True,
            highlight=False,
        )
        sys.exit(INTERRUPTED if isinstance(error, Interrupted) else 1)
