"""`bridgework data`: import, export, verify, count and preview datasets.

`bridgework data order` prints the samples of each step, `bridgework data mixture` the share of each
source.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bridgework.cli import completion, options
from bridgework.cli.options import changes
from bridgework.config import config_class, override
from bridgework.data.catalog import SYNTHETIC, destination, home, resolve
from bridgework.data.catalog import names as datasets
from bridgework.errors import DataError, SpecError, suggest
from bridgework.plugins import Plugins
from bridgework.system import RECIPES, Mixture, Source, Stage, System, load, recipes, variants

if TYPE_CHECKING:
    from bridgework.data.preview import Preview
    from bridgework.data.reader import ReaderConfig
    from bridgework.data.stats import Stats

data = typer.Typer(help="Import, export, verify and preview datasets.", no_args_is_help=True)
out, err = (  # without markup, because names and keys come from the data
    Console(stderr=stderr, markup=False, highlight=False) for stderr in (False, True)
)

Place = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="a folder, a URL, or a name under <home>/datasets",
        autocompletion=completion.datasets,
    ),
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="SYSTEM[/STAGE]",
        help="as this stage reads it",
        autocompletion=completion.systems,
    ),
]
Format = Annotated[
    str | None,
    typer.Argument(metavar="FORMAT", help="without it, the formats are listed; alone, its options"),
]
Options = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="options of the format")
]
Tiny = Annotated[bool, typer.Option("--tiny", help="with --for: the system at laptop size")]


@data.command("import")
def import_(
    format_: Format = None,
    source: Annotated[str | None, typer.Argument(help="a file, a folder or a URL")] = None,
    dest: Annotated[
        str | None, typer.Argument(help="a folder or a URL; a bare name goes to <home>/datasets")
    ] = None,
    words: Options = None,
    license: Annotated[
        str | None, typer.Option(help="of the complete dataset, e.g. CC-BY-4.0")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="actors of Ray; 0 works in this process")] = 0,
) -> None:
    """Write SOURCE as a new dataset; bad rows go to DEST.quarantine, with reasons.

    Re-running resumes.
    """
    from bridgework.api import import_with
    from bridgework.data.importers import FORMATS

    if format_ is None or source is None or dest is None:
        _describe(FORMATS, format_, source, _Actors)
        return
    cls = FORMATS.load_class(format_)
    given = options.pairs(words, "license=CC-BY-4.0")
    if "licence" in given:  # its name in earlier releases
        given["license"] = given.pop("licence")
    given |= {"license": license} if license is not None else {}
    given |= {"workers": str(workers)} if workers else {}
    shared = (_Actors,) if getattr(cls, "parallel", True) else ()
    own, *rest = options.read(f"format {format_}", given, cls, *shared)
    actors = _Actors(**rest[0]).workers if rest else 0
    import_with(
        cls(**own),
        source,
        dest,
        workers=actors,
        home=home(),
        say=lambda text: err.print(text, soft_wrap=True),
    )
    out.print(destination(dest, home()), soft_wrap=True)


@data.command("export")
def export(
    format_: Format = None,
    source: Annotated[
        str | None, typer.Argument(help="a folder, a URL, or a name under <home>/datasets")
    ] = None,
    dest: Annotated[
        str | None, typer.Argument(help="a folder or a URL where nothing is yet")
    ] = None,
    words: Options = None,
) -> None:
    """Write a dataset in another format; the last line reports the lost fields."""
    from bridgework.data.exporters import FORMATS

    if format_ is None or source is None or dest is None:
        _describe(FORMATS, format_, source)
        return
    cls = FORMATS.load_class(format_)
    (given,) = options.read(f"format {format_}", options.pairs(words, "rows=1000"), cls)
    exported = cls(**given).run(resolve(source, home()), dest)
    out.print(dest, soft_wrap=True)
    out.print(str(exported), soft_wrap=True)


@data.command()
def verify(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="folders, URLs or names")],
) -> None:
    """Read every byte and decode every image; exits 1 if anything differs from the manifest."""
    from bridgework.data.dataset import Problem
    from bridgework.data.dataset import verify as verify_dataset
    from bridgework.data.manifest import FILE

    table = Table("dataset", "file", "problem", box=None, pad_edge=False)
    for name in paths:
        try:
            with _progress(name) as progress:
                problems = verify_dataset(resolve(name, home()), progress=progress)
        except DataError as error:  # not a dataset; the others are verified all the same
            problems = [Problem(FILE, str(error))]
        for problem in problems:
            table.add_row(name, problem.file, problem.what)
        if not problems:
            out.print(f"ok        {name}", soft_wrap=True)
    if table.row_count:
        out.print(table)
        raise typer.Exit(1)


@data.command()
def stats(path: Place, for_: For = None, tiny: Tiny = False) -> None:
    """Print counts, sizes and lengths; with --for also tokens, and cut or quarantined rows."""
    from bridgework.data.stats import stats as count

    place = resolve(path, home())
    stage = None if for_ is None else _stage(for_, tiny, path, place)
    with _progress(path) as progress:
        found = count(place, for_stage=stage, progress=progress)
    _show(found)


@data.command()
def preview(
    path: Annotated[
        str | None,
        typer.Argument(help="a folder, a URL or a name; without it, all that --for reads"),
    ] = None,
    for_: For = None,
    tiny: Tiny = False,
    run: Annotated[
        str | None, typer.Option(metavar="RUN[/STAGE]", help="a run, with --step")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="of the run, from 0; highest loss first")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="rows of each dataset, or of the step")] = 4,
    seed: Annotated[int, typer.Option(help="another seed draws other rows")] = 0,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write a page instead")] = None,
) -> None:
    """Print a few samples as stored, or with --for as the model sees them, with the loss mask.

    With --run and --step: the samples of that step of a run, with their losses.
    """
    from bridgework.data.preview import page, read, stored, terminal

    if (run is None) != (step is None) or (
        run is not None and (path is not None or for_ is not None)
    ):
        raise SpecError(
            "preview takes --run RUN[/STAGE] and --step N together, without PATH and --for"
        )
    if html is not None and html.is_dir():
        raise SpecError(
            f"--html {html} is a folder; give the name of a file, e.g. {html / 'preview.html'}"
        )
    if run is not None and step is not None:
        shown, title = _step(run, step, n), f"step {step} of {run}"
    elif for_ is not None:
        stage = _stage(for_, tiny, path, None if path is None else resolve(path, home()))
        shown, title = (
            read(stage, home(), n, seed=seed),
            f"{path or ''} for {for_}, stage {stage.name}".strip(),
        )
    elif path is not None:
        shown, title = stored(resolve(path, home()), n, seed=seed), f"{path}, as it is stored"
    else:
        raise SpecError("preview needs a PATH, or --for SYSTEM[/STAGE], or --run RUN and --step N")
    if html is None:
        out.print(terminal(shown, color=out.is_terminal and not out.no_color))
        return
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(page(shown, title), encoding="utf-8")
    out.print(html, soft_wrap=True)


# --- shared ---------------------------------------------------------------------------------------


def _ray(workers: int) -> AbstractContextManager[None]:
    """Start Ray for the block if there are workers."""
    if not workers:
        return nullcontext()
    from bridgework.ray_utils import ray_session

    return ray_session()


@config_class
class _Actors:
    """The option of every import whose rows may be read in parallel."""

    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise SpecError(
                f"workers={self.workers}: 0 or more actors are allowed; 0 works in this process"
            )


def _describe(formats: Plugins, name: str | None, source: str | None, *shared: type[Any]) -> None:
    """Print the formats, or the options of one. Raises SpecError for a SOURCE without a DEST."""
    if name is None:
        rows = Table("format", "", box=None, pad_edge=False)
        for known, module in formats.modules().items():
            rows.add_row(known, options.summary(module))
        out.print(rows)
        return
    cls = formats.load_class(name)
    if source is not None:
        raise SpecError(f"{name}: DEST is missing. Got SOURCE {source}; expected SOURCE DEST")
    shared = shared if getattr(cls, "parallel", True) else ()
    out.print(options.explanation(cls), "", options.table(cls, *shared))


def _stage(words: str, tiny: bool, dataset: str | None, path: str | None) -> Stage:
    """Return the stage that `SYSTEM[/STAGE]` names, by default the first that reads `dataset`.

    With `path`, it reads that dataset only. A dataset that the stage does not name is read as its
    first one, with the same prompts.
    """
    name, slash, chosen = words.partition("/")
    system = load(name)
    stage = system[chosen] if slash else _first(system, dataset)
    source = _source(stage, dataset) or replace(stage.data.leaves[0], name="dataset")
    if tiny:
        stage = stage.tiny()
    if path is None:
        return stage
    return replace(stage, data=replace(stage.data, sources=(replace(source, dataset=path),)))


def _step(run: str, step: int, n: int) -> "list[Preview]":
    """Return the `n` samples of a step with the highest loss, as the model saw them."""
    from bridgework.data.preview import trained
    from bridgework.training.flight_recorder import replay

    again = replay(run, step, home())
    notes = [f"loss {each.loss:.3f} over {each.counted:g}" for each in again.noted]
    return trained(again.rows[:n], again.stage, notes[:n])


def _first(system: System, dataset: str | None) -> Stage:
    return next((stage for stage in system.stages if _source(stage, dataset)), system.stages[0])


def _source(stage: Stage, dataset: str | None) -> Source | None:
    return next((source for source in stage.data.leaves if source.dataset == dataset), None)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(name)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(found: "Stats") -> None:
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, value in found.summary().items():
        facts.add_row(name, value)
    spreads = Table("", *("least", "5%", "median", "95%", "most"), box=None, pad_edge=False)
    for column in spreads.columns[1:]:
        column.justify = "right"
    for name, spread in found.spreads().items():
        spreads.add_row(
            name, *(f"{v:,.0f}" if v == int(v) else f"{v:,.2f}" for v in vars(spread).values())
        )
    out.print(facts, "", spreads)


ENDLESS = 1 << 40  # steps of a mixture without caps, whose order does not depend on the budget

What = Annotated[
    str,
    typer.Argument(
        metavar="SYSTEM[/STAGE]|MIXTURE", help="or a mixture: FILE.json, module:function, a dataset"
    ),
]
Batch = Annotated[
    int | None, typer.Option(min=1, help="samples of a step; default: the stage's own")
]
OrderTiny = Annotated[bool, typer.Option("--tiny", help="the system at laptop size")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="of the system, or of the mixture"),
]
Json = Annotated[bool, typer.Option("--json", help="one object a line")]


def order(
    what: What,
    start: Annotated[int, typer.Option(min=0, help="in samples, a multiple of the batch")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="how many steps to print")] = 1,
    batch: Batch = None,
    world: Annotated[int, typer.Option(min=1, help="workers that share every batch")] = 1,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="steps of the run; default: the stage's own, or one epoch of a mixture with caps",
        ),
    ] = None,
    tiny: OrderTiny = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Print the samples of every worker and step, with the code that feeds training."""
    feed = _feed(what, batch, budget, tiny, set_)
    for step, ranks in _ordered(feed, start, steps, world):
        if json_:
            out.print(json.dumps({"step": step, "ranks": ranks}), soft_wrap=True)
        else:
            for rank, keys in enumerate(ranks):
                out.print(f"step {step}  rank {rank}  {' '.join(keys)}", soft_wrap=True)


def mixture(
    what: What,
    batch: Batch = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="default: the stage's own, or one epoch")
    ] = None,
    tiny: OrderTiny = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Print the share of every source after alpha, factors and caps, and its epochs."""
    from bridgework.data.mixture_report import explain

    stage = _stage_or_mixture(what, tiny, set_)
    blend, size, budget = _blend(what, batch, set_) if stage is None else _of(stage, batch)
    found = explain(blend, home(), batch=size, steps=steps or budget)
    if json_:
        for each in found:
            out.print(json.dumps(asdict(each)), soft_wrap=True)
        return
    out.print(f"{steps or budget:,} steps of {size:,} samples, alpha {blend.alpha:g}")
    columns = (
        "source",
        "rows",
        "by size",
        "by alpha",
        "by factor",
        "by cap",
        "realized",
        "epochs",
        "",
    )
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for each in found:
        shares = (each.by_size, each.by_alpha, each.by_factor, each.by_cap, each.realized)
        rows = f"{each.rows:,}{'' if each.known else '*'}"
        note = "capped" if each.capped else ""
        table.add_row(
            each.name, rows, *(f"{share:.2%}" for share in shares), f"{each.epochs:.3g}", note
        )
    out.print(table)
    if not all(each.known for each in found):
        out.print("* rows as given in the recipe, because the dataset is not here")


def _ordered(
    feed: "ReaderConfig", start: int, steps: int, world: int
) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield (step, keys of every rank) from the sample `start` on; SOURCE/KEY if several."""
    if start % feed.batch:
        raise SpecError(
            f"--start counts samples and must be a multiple of the batch {feed.batch}, got {start}"
        )
    first, span = start // feed.batch, feed.mixture.window
    if first + steps > ENDLESS:
        raise SpecError(
            f"--start {start} is too far: an order has at most {ENDLESS:,} steps of {feed.batch} "
            "samples. Fix: give a smaller --start"
        )
    if first + steps > feed.steps:
        raise SpecError(
            f"steps {first} to {first + steps - 1} are asked for, and the run has {feed.steps}: "
            "ask for fewer, or give a larger --budget"
        )
    reader, each = feed.open(), feed.batch // feed.mixture.lanes
    owner = {lane: rank for rank in range(world) for lane in reader.plan.lanes_of(rank, world)}
    names = [source.name for source in feed.mixture.leaves]
    step = first
    for t in range(first // span, (first + steps - 1) // span + 1):
        for rows in reader.window(range(feed.mixture.lanes), t, first_step=first)[
            : first + steps - step
        ]:
            ranks: list[list[str]] = [[] for _ in range(world)]
            for row in rows:
                ranks[owner[row.place // each]].append(
                    row.key if len(names) == 1 else f"{names[row.source]}/{row.key}"
                )
            yield step, ranks
            step += 1


def _feed(
    what: str, batch: int | None, budget: int | None, tiny: bool, words: list[str] | None
) -> "ReaderConfig":
    from bridgework.data.manifest import read_manifest
    from bridgework.data.mixture_report import ByteModelConfig
    from bridgework.data.quarantine import scratch_quarantine
    from bridgework.data.reader import ReaderConfig

    stage = _stage_or_mixture(what, tiny, words)
    if stage is not None:
        size, steps = batch or stage.budget.batch, budget or stage.budget.steps
        sized = replace(stage, budget=replace(stage.budget, batch=size, steps=steps))
        return ReaderConfig.of(sized, home(), quarantine=scratch_quarantine(home(), what))
    blend, size, epoch = _blend(what, batch, words)
    capped = any(source.max_epochs is not None for source in blend.leaves)
    paths = tuple(resolve(source.dataset, home()) for source in blend.leaves)
    return ReaderConfig(
        mixture=blend,
        datasets=paths,
        digests=tuple(read_manifest(path).digest for path in paths),
        batch=size,
        steps=budget or (epoch if capped else ENDLESS),
        seed=0,
        model=ByteModelConfig(),
        quarantine=scratch_quarantine(home(), what),
    )


def _of(stage: Stage, batch: int | None) -> tuple[Mixture, int, int]:
    """Return the mixture of a stage, the samples of a step, and the steps."""
    return stage.data, batch or stage.budget.batch, stage.budget.steps


def _blend(what: str, batch: int | None, words: list[str] | None) -> tuple[Mixture, int, int]:
    """Return a mixture, the samples of a step, and the steps of one epoch within its caps."""
    from bridgework.data.manifest import read_manifest
    from bridgework.data.mixture_report import load as load_mixture
    from bridgework.data.mixture_report import one_epoch

    blend = override(load_mixture(what), changes(words))
    rows = [read_manifest(resolve(source.dataset, home())).rows for source in blend.leaves]
    return blend, *one_epoch(blend, rows, batch)


def _stage_or_mixture(what: str, tiny: bool, words: list[str] | None) -> Stage | None:
    """Return the named stage, by default the system's first; None if `what` is a mixture.

    Raises SpecError, with a suggestion, for an unknown name.
    """
    name, slash, chosen = what.partition("/")
    recipe = name.partition(":")[0]
    if recipe not in recipes() and not _is_system(name):
        if (
            what.endswith(".json")
            or ":" in name
            or "/" in what
            or what in datasets(home())
            or what in SYNTHETIC
        ):
            return None
        known = [*recipes(), *datasets(home()), *SYNTHETIC]
        raise SpecError(f"{what!r} is not a system, a mixture or a dataset" + suggest(what, known))
    system = override(load(name).tiny() if tiny else load(name), changes(words))
    return system[chosen] if slash else system.stages[0]


def _is_system(name: str) -> bool:
    """Return True if a module of the user's own has a system of this name.

    Raises SpecError if its import fails.
    """
    path, _, variant = name.partition(":")
    if "." not in path or path.endswith(".json") or RECIPES.find(path) is None:
        return False
    return (variant or "system") in variants(path)
