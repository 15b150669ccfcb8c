"""`bridgework sweep`: search hyperparameters, and show the trials of a sweep."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from bridgework.cli.options import changes
from bridgework.errors import SpecError, suggest

if TYPE_CHECKING:
    from bridgework.tuning.search import Outcome
    from bridgework.tuning.space import Space

out, err = Console(), Console(stderr=True)
FEATURES = ("auto", "cached", "computed")


def sweep(
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE", help="Search space: a module of tune_spaces/, e.g. llava_bridge."
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Change a field of the recipe in every trial. Repeat for several.",
        ),
    ] = None,
    trials: Annotated[
        str | None,
        typer.Option(
            metavar="N|+N",
            help="Number of trials; +8 adds 8 to those that the sweep has.",
            show_default="set by the space",
        ),
    ] = None,
    prefer: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Choose the winner of several objectives, e.g. "
            "'quality >= best - 0.01, then tokens'.",
            show_default="the best quality of the Pareto front",
        ),
    ] = None,
    warm_start: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SWEEP",
            help="Let the proposals know the trials of an earlier sweep. Repeat for several.",
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="Name of the sweep; the same name resumes it.", show_default="sweep-SPACE"
        ),
    ] = None,
    project: Annotated[str, typer.Option(help="MLflow experiment to record to.")] = "bridgework",
) -> None:
    """Search hyperparameters and register the best trial, as `challenger` if it is better.

    Run again, it resumes: finished trials are not run again.
    """
    from bridgework import api
    from bridgework.tuning.space import load as load_space

    loaded = load_space(space)
    count, more = _trials(trials)
    outcome = api.sweep(
        loaded,
        changes=changes(set_),
        trials=count,
        more=more,
        prefer=prefer,
        warm_start=warm_start or (),
        run=run or f"sweep-{space}",
        project=project,
        console=err,
    )
    show(loaded, outcome)


def show(space: "Space", outcome: "Outcome") -> None:
    """Print the trials, best first, and what became of the winner."""
    from bridgework.tuning.compare import origin_cell, score_cells
    from bridgework.tuning.search import failures

    paths = list(dict.fromkeys(path for row in outcome.rows for path in row.changes))
    names = shortened(paths)
    metrics = [metric.name for metric in space.metrics]
    origins = ["from"] if any(row.origin for row in outcome.rows) else []
    table = Table("trial", *metrics, "status", *origins, "s", *names, box=None, pad_edge=False)
    for row in outcome.rows:
        found = outcome.intervals.get(row.trial, (None,) * len(metrics))
        shown = [cell.replace("[", r"\[") for cell in score_cells(row, found)]
        mark = "*" if row.trial in outcome.front else ""
        values = [_shown(row.changes.get(path, "")) for path in paths]
        cells = [row.status, *([origin_cell(row)] if origins else []), f"{row.seconds:.0f}"]
        table.add_row(row.trial + mark, *shown, *cells, *values)
    out.print(table)
    if outcome.front:
        out.print("* on the Pareto front", highlight=False)
    reasons = failures(outcome.rows)
    if reasons:
        failed = sum(row.status == "failed" for row in outcome.rows)
        out.print(f"failed    {failed} of {len(outcome.rows)} trials", highlight=False)
        for reason in reasons:
            out.print(f"  {reason}", soft_wrap=True, highlight=False, markup=False)
    if outcome.verdict:
        out.print(f"verdict   {outcome.verdict}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"again     {outcome.command}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"artifact  {outcome.artifact}", soft_wrap=True, highlight=False)
    if outcome.report:
        out.print(f"report    {outcome.report}", soft_wrap=True, highlight=False)
    if outcome.version:
        aliases = f" ({', '.join(outcome.version.aliases)})" if outcome.version.aliases else ""
        out.print(
            f"model     {outcome.version.name}:{outcome.version.version}{aliases}", highlight=False
        )
    if outcome.not_challenger:
        out.print(outcome.not_challenger, soft_wrap=True, highlight=False)


def report(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="Name of a sweep's run.")],
) -> None:
    """Write the report of a sweep: an HTML page and PNG figures."""
    from bridgework.data.catalog import home
    from bridgework.tuning import report as reports

    page = reports.write(reports.load(home(), sweep))
    out.print(f"report    {page}", soft_wrap=True, highlight=False)


def shortened(paths: list[str]) -> list[str]:
    """Return the shortest ends of dotted paths that differ from each other."""
    parts = [path.split(".") for path in paths]
    ends = []
    for own in parts:
        for size in range(1, len(own) + 1):
            if sum(other[-size:] == own[-size:] for other in parts) == 1:
                break
        ends.append(".".join(own[-size:]))
    return ends


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _trials(text: str | None) -> tuple[int | None, int]:
    """Return (number of trials, further trials) of `8` or `+8`."""
    if text is None:
        return None, 0
    digits = text.removeprefix("+")
    if not digits.isdecimal() or int(digits) < 1:
        raise SpecError(f"--trials: invalid number. Got {text!r}; expected e.g. 8, or +8 for more")
    return (None, int(digits)) if text.startswith("+") else (int(digits), 0)


def checked_features(text: str) -> Literal["auto", "cached", "computed"]:
    """Return the value of --features. Raises SpecError for another one."""
    if text == "cached":
        return "cached"
    if text == "computed":
        return "computed"
    if text != "auto":
        raise SpecError(f"--features: unknown choice {text!r}{suggest(text, FEATURES)}")
    return "auto"
