"""`bridgework mixture search`: find the mixture of a stage for the cost of K + 3 short runs."""

from math import isfinite
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from bridgework.cli.options import changes
from bridgework.config import override
from bridgework.errors import SpecError
from bridgework.system import load

if TYPE_CHECKING:
    from bridgework.evaluation.base import Figure
    from bridgework.tuning.mixture_search import MixtureOutcome

mixture = typer.Typer(help="Search the mixture of a stage.", no_args_is_help=True)
out, err = Console(), Console(stderr=True)


@mixture.callback()
def _group() -> None:
    """Search the mixture of a stage."""


@mixture.command()
def search(
    stage: Annotated[
        str,
        typer.Argument(metavar="SYSTEM/STAGE", help="A stage with two or more sources."),
    ],
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Use the recipe at laptop size, on synthetic pairs.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a field of the recipe."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Metric to optimize.", show_default="the first of the stage's"),
    ] = None,
    merges: Annotated[int, typer.Option(min=1, help="Averages of models to evaluate.")] = 200,
    max_epochs: Annotated[
        float | None, typer.Option(help="Repeat no source more often than this.")
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Also train by equal shares and by size: two more runs."),
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Ray Train workers of a run; 0 trains in this process.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch on a CPU.")] = 0,
    run: Annotated[
        str | None, typer.Option(help="Name of the runs.", show_default="mixture-SYSTEM-STAGE")
    ] = None,
) -> None:
    """Train on each source, merge the models, and verify the best mixtures by real runs.

    Run again, it uses what is finished.
    """
    from bridgework.data.catalog import home
    from bridgework.ray_utils import ray_session
    from bridgework.training.options import RunOptions
    from bridgework.tuning.mixture_search import MixtureSearch

    name, slash, stage_name = stage.rpartition("/")
    if not slash or not name:
        raise SpecError(f"mixture search: expected SYSTEM/STAGE, got {stage!r}")
    system = load(name)
    system = override(system.tiny() if tiny else system, changes(set_))
    prefix = name.replace(":", "-").replace(".", "-") + "-tiny" * tiny
    found = MixtureSearch(
        system,
        stage_name,
        home=home(),
        run=run or f"mixture-{prefix}-{stage_name}",
        metric=metric,
        max_epochs=max_epochs,
        options=RunOptions(workers=workers, threads=threads),
        console=err,
    )
    if workers:
        with ray_session():
            outcome = found.search(merges, baselines=baselines)
    else:
        outcome = found.search(merges, baselines=baselines)
    show(outcome, found.metric)


def show(outcome: "MixtureOutcome", metric: str) -> None:
    """Print the table of sources and metrics, the mixtures, and the verdict, with intervals."""
    metrics = list(dict.fromkeys(key for row in outcome.influence.values() for key in row))
    heads = [Column(name, overflow="fold") for name in metrics]  # in full, also in narrow logs
    table = Table("trained on", *heads, box=None, pad_edge=False)
    for source, figures in outcome.influence.items():
        table.add_row(source, *(_cell(figures[key]) if key in figures else "" for key in metrics))
    out.print(table)
    judged = Column(metric, overflow="fold")
    table = Table("mixture", *outcome.sources, judged, "merged", box=None, pad_edge=False)
    for place, weights in enumerate(outcome.best):
        shares = [f"{weight:.1%}" for weight in weights]
        scores = _cell(outcome.scores[place]), _cell(outcome.predicted[place])
        table.add_row(f"best {place + 1}", *shares, *scores)
    for name, figure in outcome.baselines.items():
        table.add_row(name, *[""] * len(outcome.sources), _cell(figure), "")
    out.print(table)
    out.print(f"verdict   {outcome.verdict}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"nearest   alpha {outcome.alpha:.2f}", highlight=False)
    words = " ".join(f"--set {path}={value}" for path, value in outcome.settings.items())
    out.print(f"settings  {words}", soft_wrap=True, highlight=False, markup=False)


def _cell(figure: "Figure") -> str:
    """Return e.g. `0.412 [0.314, 0.51]`, escaped for a table."""
    text = f"{figure.value:.3g}"
    if (found := figure.interval) is not None and isfinite(found.low):
        text += f" [{found.low:.3g}, {found.high:.3g}]"
    return escape(text)
