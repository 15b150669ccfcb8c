"""The `bridgework` command. Hyperparameters have no flags of their own, only `--set PATH=VALUE`.

Heavy libraries are imported by the command that needs them, so that `bridgework --help` is fast.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from bridgework import storage
from bridgework.cli import completion
from bridgework.cli.curate import curate
from bridgework.cli.data import data, mixture, order
from bridgework.cli.jobs import check_env, submit
from bridgework.cli.judging import (
    compare,
    evaluate,
    history,
    interval_cells,
    promote,
    register,
    rollback,
)
from bridgework.cli.mixtures import mixture as mixture_search
from bridgework.cli.models import ask, export, importing
from bridgework.cli.options import Project, changes, number_or_range, pairs
from bridgework.cli.sweeps import checked_features, report, sweep
from bridgework.config import flat, override
from bridgework.data.catalog import home as home_folder
from bridgework.errors import BridgeworkError, Interrupted, Paused, ResourceError, SpecError
from bridgework.ray_utils import RESIZE_S, TIMEOUT_S
from bridgework.system import System, load, recipes, variants

if TYPE_CHECKING:
    from bridgework.cli.diagnostics import Check

app = typer.Typer(
    help="Train, evaluate and serve vision-language systems on Ray. Change any field of a recipe "
    "with --set PATH=VALUE; `bridgework show SYSTEM` lists the paths.",
    no_args_is_help=True,
)
out, err = Console(), Console(stderr=True)

# Panels of `bridgework --help`, in the order of their first command.
DATA, TRAIN, EVALUATE, SERVE = "Data", "Training", "Evaluation and conversion", "Serving"
MACHINE = "Machine and cluster"

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
        str,
        typer.Option(
            metavar="N|MIN:MAX",
            help="Ray Train workers; 0 trains in this process, 1:4 uses what the cluster has.",
        ),
    ] = "1",
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
    until: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEP",
            help="Stop the last of the stages after STEP, with a checkpoint that --fork can name.",
            show_default="its end",
        ),
    ] = None,
    evaluate_every: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="STEPS",
            help="Steps between two evaluations before the end of a stage; 0: only at its end.",
        ),
    ] = 0,
    evaluate_in_task: Annotated[
        bool,
        typer.Option(
            "--evaluate-in-task",
            help="Evaluate in Ray tasks on snapshots of the weights; the training continues.",
        ),
    ] = False,
    keep_best: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Keep the step with the best METRIC, e.g. heldout.loss, as the result of a stage.",
            show_default="the last step",
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
            help="GPUs of each worker; 0 trains on CPUs.",
            show_default="1 if the cluster has or can start GPU nodes, else 0",
        ),
    ] = None,
    resource_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Time to wait for the resources of the workers, also after the loss of a node.",
        ),
    ] = TIMEOUT_S,
    resize_every: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="With --workers MIN:MAX, the interval of the checks for room for more workers.",
        ),
    ] = RESIZE_S,
    features: Annotated[
        str,
        typer.Option(
            metavar="auto|cached|computed",
            help="Features of frozen vision towers: read from a cache or computed in training.",
            show_default="whichever is cheaper",
        ),
    ] = "auto",
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            help="Threads of torch on a CPU. Equal threads give equal bits.",
            show_default="the cores, divided among the workers",
        ),
    ] = 0,
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
    from bridgework.artifacts import describe
    from bridgework.evaluation.results import records_of
    from bridgework.training.options import RunOptions
    from bridgework.training.run_dir import default_name

    resolved = _resolve(system, set_, tiny)
    prefix = system.replace(":", "-").replace(".", "-") + "-tiny" * tiny
    asked = number_or_range(workers)
    results = api.train(
        resolved,
        stages=stage,
        workers=asked,
        run=run or default_name(prefix, resolved, home_folder()),
        options=RunOptions(
            readers=readers,
            skip=tuple(skip or ()),
            workers=asked,
            until=until,
            evaluate_every=evaluate_every,
            evaluate_in_task=evaluate_in_task,
            keep_best=keep_best,
            features=checked_features(features),
            threads=threads,
            gpus_per_worker=gpus_per_worker,
            resource_timeout_s=resource_timeout,
            resize_every_s=resize_every,
            trust_checkpoints=trust_checkpoints,
            start_over=start_over,
        ),
        fork=fork,
        project=project,
        console=err,
    )
    table = Table("stage", "metric", "value", "95 % interval", "n", box=None, pad_edge=False)
    for name, result in results.items():
        weights = describe(result.artifact).digest
        records = records_of(result.artifact, weights, home_folder())
        figures = {figure.name: figure for record in records for figure in record.figures}
        for key, value in result.metrics.items():
            if key.startswith(BY_SOURCE):
                continue  # recorded in MLflow
            cells = interval_cells(figures[key]) if key in figures else ("", "")
            table.add_row(name, key, f"{value:.4g}", *cells)
            name = ""
    out.print(table)
    last = results[list(results)[-1]]
    out.print(f"artifact  {last.artifact}", soft_wrap=True, highlight=False)
    if last.version:
        out.print(f"model     {last.version}", highlight=False)


app.command(rich_help_panel=TRAIN)(sweep)
app.command(rich_help_panel=TRAIN)(report)
app.add_typer(mixture_search, name="mixture", rich_help_panel=TRAIN)
app.command("eval", rich_help_panel=EVALUATE)(evaluate)
app.command(rich_help_panel=EVALUATE)(compare)
app.command(rich_help_panel=EVALUATE)(ask)
app.command(rich_help_panel=EVALUATE)(export)
app.add_typer(importing, name="import", rich_help_panel=EVALUATE)


app.command(rich_help_panel=SERVE)(register)
app.command(rich_help_panel=SERVE)(promote)
app.command(rich_help_panel=SERVE)(rollback)
app.command(rich_help_panel=SERVE)(history)


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
    auto_promote: Annotated[
        bool,
        typer.Option(
            "--auto-promote",
            help="Promote a challenger that was good for canary.promote_requests requests and "
            "canary.promote_s seconds; the same as auto_promote=true.",
        ),
    ] = False,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a config for `serve deploy` instead of serving."),
    ] = None,
) -> None:
    """Serve a model over HTTP until Ctrl-C or SIGTERM."""
    from bridgework.serving import launch

    args = pairs(arguments, "model=llava") | ({"auto_promote": "true"} if auto_promote else {})
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
def traffic(
    name: Annotated[str, typer.Argument(metavar="APP", help="Name of the running app, e.g. chat.")],
    share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="New share of the challenger.", show_default="only print the shares"
        ),
    ] = None,
) -> None:
    """Print how a running app compares its challenger, or change the challenger's share."""
    from bridgework.serving import launch

    state = launch.traffic(name, share)
    figures = state["figures"]
    columns = ("requests", "error_rate", "median_s", "probe_score")
    table = Table("role", "model", "share", "running", *columns, box=None, pad_edge=False)
    for row in state["models"]:
        group = "challenger" if row["role"] == "challenger" else "baseline"
        values = [figures.get(f"{group}.{column}") for column in columns]
        compared = ["-" if value is None else f"{value:.4g}" for value in values]
        table.add_row(
            row["role"], row["model"], f"{row['share']:.0%}", str(row["running"]), *compared
        )
    out.print(table)
    if state["rolled_back"]:
        out.print(f"rolled back: {state['rolled_back']}", soft_wrap=True, highlight=False)


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


app.command(
    rich_help_panel=MACHINE,
    # options after the command belong to it
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)(submit)


@app.command(rich_help_panel=MACHINE)
def doctor(
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Check every node of the cluster that RAY_ADDRESS names."),
    ] = False,
) -> None:
    """Check that this machine can run bridgework, and print a fix for each failed check."""
    from bridgework.cli.diagnostics import checks

    table = Table("", "check", "found", "advice", box=None, pad_edge=False)
    results = _cluster_checks() if cluster else checks(home_folder())
    for check in results:
        table.add_row("ok" if check.ok else "no", check.name, check.found, check.advice)
    out.print(table)
    if not all(check.ok for check in results):
        raise typer.Exit(1)


# --- helpers


def _cluster_checks() -> "list[Check]":
    from bridgework import ray_utils
    from bridgework.cli import cluster_checks

    if ray_utils.address() is None:
        raise ResourceError(
            "doctor --cluster: no cluster is named. Fix: `bridgework submit doctor --cluster`, or "
            "set RAY_ADDRESS on a node of it"
        )
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    with ray_utils.ray_session():
        nodes = cluster_checks.ask(str(home_folder()), tracking)
    return cluster_checks.checks(nodes, cluster_checks.own_versions(), tracking)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"


def _resolve(name: str, assignments: list[str] | None, tiny: bool) -> System:
    system = load(name)
    return override(system.tiny() if tiny else system, changes(assignments))


def _terminate(number: int, frame: FrameType | None) -> None:
    """End a command that SIGTERM stops, e.g. by `ray job stop`; `train` saves a checkpoint first."""
    err.print("[bold red]error[/]  stopped by SIGTERM. The same command resumes", highlight=False)
    raise SystemExit(INTERRUPTED)


def main() -> None:
    """Run the console script. An expected error is one line, with a traceback only with --debug."""
    sys.path.append(os.getcwd())  # for tune_spaces/ and your own modules, as with `python -m`
    signal.signal(signal.SIGTERM, _terminate)
    try:
        check_env()
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
        if isinstance(error, Paused):
            err.print(str(error), soft_wrap=True, highlight=False, markup=False)
            sys.exit(0)
        escaped = str(error).replace("[", r"\[")  # not rich markup
        err.print(
            f"[bold red]error[/]  {escaped}",
            soft_wrap=True,
            highlight=False,
        )
        sys.exit(INTERRUPTED if isinstance(error, Interrupted) else 1)
