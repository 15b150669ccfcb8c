"""Report of a sweep: one self-contained HTML page and PNG figures, made from its study alone.

The page holds plotly's script itself, so that it opens without a network. Importances are those of
PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255), as Optuna computes them.
"""

import html
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator

from bridgework import storage
from bridgework.errors import RunError, suggest
from bridgework.training import run_dir
from bridgework.tuning import study as studies
from bridgework.tuning.choice import front, ranked
from bridgework.tuning.compare import (
    origin_cell,
    score_cells,
    score_interval,
    score_intervals,
)
from bridgework.tuning.space import Metric
from bridgework.tuning.study import TrialRow, url_of

FOLDER, PAGE = "report", "index.html"
SHARE, LOSS = "share.", "loss."  # prefixes of metrics by source
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #ddd }
code, pre { background: #f4f4f4; padding: .2rem .4rem; white-space: pre-wrap }
.failed { color: #a00 } .won { font-weight: 600 }
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as its study remembers it."""

    run: str
    folder: Path
    study: optuna.Study
    metrics: tuple[Metric, ...]
    rows: tuple[TrialRow, ...]  # best first
    outcome: Mapping[str, Any]  # notes of the end: command, verdict, prefer, stage, cpus, ...

    @property
    def metric(self) -> Metric:
        return self.metrics[0]


def load(home: Path, run: str) -> SweepRecord:
    """Read a sweep. Raises RunError, with a suggestion, if there is none of that name."""
    folder = run_dir.path_of(home, run)
    if not (folder / studies.FILE).is_file():
        runs = home / "runs"
        known = [file.parent.relative_to(runs).as_posix() for file in runs.rglob(studies.FILE)]
        raise RunError(f"there is no sweep {run!r} under {runs}{suggest(run, known)}")
    found = optuna.load_study(study_name=run, storage=url_of(folder))
    identity = found.user_attrs.get("identity")
    if identity is None:
        raise RunError(f"sweep {run!r} has not started. Fix: run `bridgework sweep` first")
    metrics = tuple(Metric(name=m["name"], mode=m["mode"]) for m in identity["metrics"])
    outcome = found.user_attrs.get("outcome", {})
    rows = [
        studies.row_of(trial, trial.params)
        for trial in found.get_trials(deepcopy=False)
        if not studies.is_warm(trial)
    ]
    best_first = ranked(rows, metrics, str(outcome.get("prefer", "")))
    about = {"stage": identity["stages"][-1], "system": identity["system"], **outcome}
    return SweepRecord(run, folder, found, metrics, tuple(best_first), about)


def write(record: SweepRecord) -> Path:
    """Write the page and the PNG figures to `report/` in the sweep's folder; returns the page."""
    folder = record.folder / FOLDER
    folder.mkdir(exist_ok=True)
    figures, drawn = dict[str, str](), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Optuna and matplotlib, about layouts and experiments
        for title, draw in _figures(record).items():
            try:
                figures[title] = _embedded(draw(), first=drawn == 0)
                drawn += 1
            except Exception as error:  # e.g. too few trials; a figure never ends a sweep
                figures[title] = f"<p>Not drawn: {html.escape(str(error))}</p>"
        _write_png(record, folder)
    page = folder / PAGE
    storage.write_atomic(page, _page(record, figures))
    return page


# --- figures -----------------------------------------------------------------------------------


def _figures(record: SweepRecord) -> dict[str, Callable[[], Any]]:
    """Return the figures by title, drawn when they are called."""
    from optuna import visualization as plots

    found, several = record.study, len(record.metrics) > 1
    target = (lambda trial: float(trial.values[0])) if several else None
    about: dict[str, Any] = {"target": target, "target_name": record.metric.name}
    drawn: dict[str, Callable[[], Any]] = {
        "Scores with 95 % intervals": lambda: _scores(record),
        "Learning curves by judgment": lambda: _curves(record),
    }
    if several and len(record.metrics) <= 3:
        drawn["Pareto front"] = lambda: plots.plot_pareto_front(
            found, target_names=[metric.name for metric in record.metrics]
        )
    drawn |= {
        "Parallel coordinates": lambda: plots.plot_parallel_coordinate(found, **about),
        "Importance of each parameter": lambda: plots.plot_param_importances(
            found, evaluator=PedAnovaImportanceEvaluator(), **about
        ),
        "Score by each parameter": lambda: plots.plot_slice(found, **about),
    }
    if any(row.origin for row in record.rows):
        drawn["Values of the population by judgment"] = lambda: _course(record)
    if _sources(record, SHARE):
        drawn["Realized mixture of each trial"] = lambda: _by_source(record, SHARE, stacked=True)
    if _sources(record, LOSS):
        drawn["Training loss by source"] = lambda: _by_source(record, LOSS, stacked=False)
    drawn["Cost of each trial"] = lambda: _cost(record)
    return drawn


def _scores(record: SweepRecord) -> Any:
    import plotly.graph_objects as go

    rows = [row for row in record.rows if row.finished]
    if not rows:
        raise ValueError("no trial has finished")
    intervals = [
        score_interval(row, record.metric, record.folder, record.outcome["stage"]) for row in rows
    ]
    figure = go.Figure(
        go.Scatter(
            x=[row.trial for row in rows],
            y=[row.scores[0] for row in rows],
            mode="markers",
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [i.high - i.value if i else 0.0 for i in intervals],
                "arrayminus": [i.value - i.low if i else 0.0 for i in intervals],
            },
            text=[json.dumps(dict(row.changes), default=str) for row in rows],
        )
    )
    figure.update_layout(xaxis_title="trial, best first", yaxis_title=record.metric.name)
    figure.update_xaxes(type="category")
    return figure


def _curves(record: SweepRecord) -> Any:
    import plotly.graph_objects as go

    figure, depth = go.Figure(), generations(record.rows)
    by_name = {row.trial: row for row in record.rows}
    for row in record.rows:
        curve = dict(row.curve)
        if row.finished:
            curve[max(curve, default=depth[row.trial] - 1) + 1] = row.scores[0]
        if curve and row.origin is not None:  # joined to the trial that it continues
            curve = {**by_name[row.origin.trial].curve, **curve}
        if curve:
            figure.add_trace(
                go.Scatter(x=list(curve), y=list(curve.values()), name=f"{row.trial} {row.status}")
            )
    figure.update_layout(xaxis_title="judgment", yaxis_title=record.metric.name)
    return figure


def lineage(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the trials that the best one continues, oldest first, and itself.

    rows: best first.
    """
    by_name, found = {row.trial: row for row in rows}, [rows[0]]
    while (origin := found[0].origin) is not None:
        found.insert(0, by_name[origin.trial])
    return found


def generations(rows: Sequence[TrialRow]) -> dict[str, int]:
    """Return the generation of each trial, from 1: trials without an origin are the first."""
    found: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row.trial):
        found[row.trial] = found[row.origin.trial] + 1 if row.origin else 1
    return found


def _course(record: SweepRecord) -> Any:
    """Draw the values of every trial of a population, joined to those that it continues."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    by_name, depth = {row.trial: row for row in record.rows}, generations(record.rows)
    paths = list(dict.fromkeys(path for row in record.rows for path in row.changes))
    figure = make_subplots(rows=len(paths), cols=1, subplot_titles=paths)
    winner = lineage(record.rows)
    for place, path in enumerate(paths, 1):
        x: list[int | None] = []
        y: list[Any] = []
        for row in record.rows:
            if row.origin is None:
                continue
            before = by_name[row.origin.trial]
            x += [depth[before.trial], depth[row.trial], None]
            y += [before.changes.get(path), row.changes.get(path), None]
        options = {"mode": "lines+markers", "showlegend": place == 1}
        grey, red = {"color": "#bbb"}, {"color": "#c33"}
        figure.add_trace(
            go.Scatter(x=x, y=y, name="all trials", line=grey, **options), row=place, col=1
        )
        own = [row.changes.get(path) for row in winner]
        steps = [depth[row.trial] for row in winner]
        figure.add_trace(
            go.Scatter(x=steps, y=own, name="the winner", line=red, **options), row=place, col=1
        )
    figure.update_xaxes(title_text="judgment", dtick=1)
    return figure


def _sources(record: SweepRecord, prefix: str) -> list[str]:
    """Return the metrics of finished trials with a prefix and a source."""
    parts = 2 if prefix == SHARE else 3
    keys = [
        key
        for row in record.rows
        for repeat in row.repeats
        for key in repeat
        if key.startswith(prefix) and key.count(".") == parts - 1
    ]
    return list(dict.fromkeys(keys))


def _by_source(record: SweepRecord, prefix: str, *, stacked: bool) -> Any:
    import plotly.graph_objects as go

    rows = [row for row in record.rows if row.finished]
    figure = go.Figure()
    for key in _sources(record, prefix):
        values = [_mean([float(r[key]) for r in row.repeats if key in r]) for row in rows]
        figure.add_trace(
            go.Bar(x=[row.trial for row in rows], y=values, name=key.removeprefix(prefix))
        )
    figure.update_layout(barmode="stack" if stacked else "group")
    figure.update_xaxes(type="category")
    return figure


def _cost(record: SweepRecord) -> Any:
    import plotly.graph_objects as go

    rows = sorted(record.rows, key=lambda row: row.trial)
    figure = go.Figure(
        go.Bar(
            x=[row.trial for row in rows],
            y=[_hours(record, row, "cpus") for row in rows],
            text=[row.status for row in rows],
        )
    )
    figure.update_layout(xaxis_title="trial", yaxis_title="CPU-hours")
    figure.update_xaxes(type="category")
    return figure


def _write_png(record: SweepRecord, folder: Path) -> None:
    """Write the figures that Optuna draws with matplotlib, and the scores."""
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    several = len(record.metrics) > 1
    target = (lambda trial: float(trial.values[0])) if several else None
    about: dict[str, Any] = {"target": target, "target_name": record.metric.name}
    drawn: dict[str, Callable[[], Any]] = {
        "parallel": lambda: plots.plot_parallel_coordinate(record.study, **about),
        "slices": lambda: plots.plot_slice(record.study, **about),
        "importance": lambda: plots.plot_param_importances(
            record.study, evaluator=PedAnovaImportanceEvaluator(), **about
        ),
    }
    if several and len(record.metrics) <= 3:
        drawn["front"] = lambda: plots.plot_pareto_front(
            record.study, target_names=[metric.name for metric in record.metrics]
        )
    else:
        drawn["curves"] = lambda: plots.plot_intermediate_values(record.study)
    for name, draw in drawn.items():
        try:
            draw()
            pyplot.gcf().set_size_inches(10, 5)
            pyplot.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        except Exception as error:
            log.info("%s is not drawn: %s", name, error)
        finally:
            pyplot.close("all")
    rows = [row for row in record.rows if row.finished]
    figure, axes = pyplot.subplots(figsize=(10, 4))
    for place, row in enumerate(rows):
        found = score_interval(row, record.metric, record.folder, record.outcome["stage"])
        bars = [[found.value - found.low], [found.high - found.value]] if found else None
        axes.errorbar([place], [row.scores[0]], yerr=bars, fmt="o", color="tab:blue", capsize=4)
    axes.set_xticks(range(len(rows)), [row.trial for row in rows])
    axes.set_xlabel("trial, best first")
    axes.set_ylabel(record.metric.name)
    figure.savefig(folder / "scores.png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _embedded(figure: Any, *, first: bool) -> str:
    """Return a figure as HTML; the first one holds plotly's script for all."""
    figure.update_layout(template="plotly_white", height=480)
    return str(figure.to_html(full_html=False, include_plotlyjs=first))


# --- page --------------------------------------------------------------------------------------


def _page(record: SweepRecord, figures: Mapping[str, str]) -> str:
    counts = Counter(row.status for row in record.rows)
    states = ", ".join(f"{number} {status}" for status, number in counts.items())
    cpu, gpu = (sum(_hours(record, row, name) for row in record.rows) for name in ("cpus", "gpus"))
    parts = [
        f"<h1>Sweep {html.escape(record.run)}</h1>",
        f"<p>{html.escape(str(record.outcome['system']))}, stage "
        f"{html.escape(str(record.outcome['stage']))}: {len(record.rows)} trials ({states}), "
        f"{cpu:.3g} CPU-hours" + (f", {gpu:.3g} GPU-hours" if gpu else "") + ".</p>",
        *_winner(record),
        "<h2>Trials</h2>",
        _table(record),
        *_failures(record),
        "<h2>Not shown by this sweep</h2>",
        "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in limits(record)) + "</ul>",
    ]
    for title, figure in figures.items():
        parts += [f"<h2>{html.escape(title)}</h2>", figure]
    title = html.escape(f"Sweep {record.run}")
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>"
    )


def _winner(record: SweepRecord) -> list[str]:
    if not record.rows or not record.rows[0].finished:
        return ["<p>No trial has finished.</p>"]
    best = record.rows[0]
    lines = [f"<h2>Winner: {best.trial}</h2>"]
    if rule := record.outcome.get("prefer"):
        lines.append(f"<p>Chosen by the rule <code>{html.escape(str(rule))}</code>.</p>")
    if verdict := record.outcome.get("verdict"):
        lines.append(f"<p>{html.escape(str(verdict))}.</p>")
    if command := record.outcome.get("command"):
        lines.append(f"<pre>{html.escape(str(command))}</pre>")
    return lines


def _table(record: SweepRecord) -> str:
    paths = list(dict.fromkeys(path for row in record.rows for path in row.changes))
    optimal = {row.trial for row in front(record.rows, record.metrics)}
    several = len(record.metrics) > 1
    origins = ["from"] if any(row.origin for row in record.rows) else []
    head = ["trial", *(m.name for m in record.metrics), "status", *origins, "s", *paths]
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    for place, row in enumerate(record.rows):
        found = score_intervals(row, record.metrics, record.folder, record.outcome["stage"])
        cells = [
            row.trial + (" *" if several and row.trial in optimal else ""),
            *score_cells(row, found, missing=""),
            row.status,
            *([origin_cell(row)] if origins else []),
            f"{row.seconds:.0f}",
            *(str(row.changes.get(path, "")) for path in paths),
        ]
        kind = "won" if place == 0 and row.finished else row.status
        texts = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr class="{kind}">{texts}</tr>')
    note = "<p>Scores with their 95 % intervals, where the evaluation has rows.</p>"
    note += "<p>* on the Pareto front</p>" if several else ""
    return "<table>" + "\n".join(lines) + "</table>" + note


def _failures(record: SweepRecord) -> list[str]:
    failed = [row for row in record.rows if row.status == "failed"]
    if not failed:
        return []
    reasons = "".join(f"<li>{row.trial}: {html.escape(row.reason)}</li>" for row in failed)
    return [f"<h2>{len(failed)} failed trials</h2>", f'<ul class="failed">{reasons}</ul>']


def limits(record: SweepRecord) -> list[str]:
    """Return sentences about what the sweep cannot show."""
    repeats = max((len(row.repeats) for row in record.rows), default=0)
    parameters = len({path for row in record.rows for path in row.changes})
    counts = Counter(row.status for row in record.rows)
    texts = []
    if repeats <= 1:
        texts.append(
            "Every configuration was trained with one seed. An interval covers the rows of the "
            "evaluation, and not other seeds: BUDGET.repeats does."
        )
    else:
        texts.append(f"Intervals are over {repeats} seeds, which is few for an interval.")
    texts.append(
        f"The winner is the best of {len(record.rows)} on the rows that chose it, so its score is "
        "too good by an unknown amount. Evaluate it on other rows before it is promoted."
    )
    if len(record.rows) < 10 * parameters:
        texts.append(
            f"{len(record.rows)} trials cover {parameters} parameters thinly: importances and "
            "slices are hints."
        )
    if any(row.origin for row in record.rows):
        texts.append(
            "A population was trained with one course of values. The winner's last values alone are "
            "not a recipe: its command repeats the course."
        )
    if counts["stopped"]:
        texts.append(
            f"{counts['stopped']} trials were stopped early. Their last values are not comparable "
            "with those of finished trials, and a slow starter may be among them."
        )
    return texts


def _hours(record: SweepRecord, row: TrialRow, resource: str) -> float:
    return row.seconds * float(record.outcome.get(resource) or 0.0) / 3600


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
