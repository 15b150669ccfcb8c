"""`bridgework data order` and `bridgework data mixture`: which samples come when, and why so many of each source."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bridgework.cli_data import out
from bridgework.cli_words import changes
from bridgework.data.catalog import SYNTHETIC, home, resolve
from bridgework.data.catalog import names as datasets
from bridgework.errors import SpecError, suggest
from bridgework.spec import override
from bridgework.system import Mixture, Stage, load, recipes

if TYPE_CHECKING:
    from bridgework.data.reader import Feed

ENDLESS = 1 << 40  # steps of a mixture that nothing caps: its order depends on no budget

What = Annotated[
    str, typer.Argument(metavar="SYSTEM[/STAGE]|MIXTURE", help="or a mixture: FILE.json, module:function, a dataset")
]
Batch = Annotated[int | None, typer.Option(min=1, help="samples of a step; default: the stage's own")]
Tiny = Annotated[bool, typer.Option("--tiny", help="the system at laptop size")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="of the system, or of the mixture")]
Json = Annotated[bool, typer.Option("--json", help="one object a line")]


def order(
    what: What,
    start: Annotated[int, typer.Option(min=0, help="in samples, a multiple of the batch")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="how many steps to print")] = 1,
    batch: Batch = None,
    world: Annotated[int, typer.Option(min=1, help="workers that share every batch")] = 1,
    budget: Annotated[
        int | None,
        typer.Option(min=1, help="steps of the whole run; default: the stage's own, of a mixture with caps one epoch"),
    ] = None,
    tiny: Tiny = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Which samples every worker gets at every step: read by the code that feeds training."""
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
    steps: Annotated[int | None, typer.Option(min=1, help="default: the stage's own, or one epoch")] = None,
    tiny: Tiny = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """What every source gives: what alpha, factors and caps did to its share, and how often it is passed over."""
    from bridgework.data.mixtures import explain

    stage = _stage(what, tiny, set_)
    blend, size, budget = _blend(what, batch, set_) if stage is None else _of(stage, batch)
    found = explain(blend, home(), batch=size, steps=steps or budget)
    if json_:
        for each in found:
            out.print(json.dumps(asdict(each)), soft_wrap=True)
        return
    out.print(f"{steps or budget:,} steps of {size:,} samples, alpha {blend.alpha:g}")
    columns = ("source", "rows", "by size", "by alpha", "by factor", "by cap", "realised", "epochs", "")
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for each in found:
        shares = (each.by_size, each.by_alpha, each.by_factor, each.by_cap, each.realised)
        rows = f"{each.rows:,}{'' if each.known else '*'}"
        told = "capped" if each.capped else ""
        table.add_row(each.name, rows, *(f"{share:.2%}" for share in shares), f"{each.epochs:.3g}", told)
    out.print(table)
    if not all(each.known for each in found):
        out.print("* as the recipe names it: the dataset is not here")


def _ordered(feed: "Feed", start: int, steps: int, world: int) -> Iterator[tuple[int, list[list[str]]]]:
    """(step, the keys of every rank) from the sample `start` on; of several sources, SOURCE/KEY."""
    if start % feed.batch:
        raise SpecError(f"--start counts samples and must be a multiple of the batch {feed.batch}, got {start}")
    first, span = start // feed.batch, feed.mixture.window
    if first + steps > ENDLESS:
        raise SpecError(
            f"--start {start} is too far: an order is given for {ENDLESS:,} steps of {feed.batch} samples. "
            "Fix: give a smaller --start"
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
        for rows in reader.window(range(feed.mixture.lanes), t, first_step=first)[: first + steps - step]:
            ranks: list[list[str]] = [[] for _ in range(world)]
            for row in rows:
                ranks[owner[row.place // each]].append(row.key if len(names) == 1 else f"{names[row.source]}/{row.key}")
            yield step, ranks
            step += 1


def _feed(what: str, batch: int | None, budget: int | None, tiny: bool, words: list[str] | None) -> "Feed":
    from bridgework.data.manifest import read_manifest
    from bridgework.data.mixtures import Bare
    from bridgework.data.quarantine import aside
    from bridgework.data.reader import Feed

    stage = _stage(what, tiny, words)
    if stage is not None:
        size, steps = batch or stage.budget.batch, budget or stage.budget.steps
        sized = replace(stage, budget=replace(stage.budget, batch=size, steps=steps))
        return Feed.of(sized, home(), quarantine=aside(home(), what))
    blend, size, epoch = _blend(what, batch, words)
    capped = any(source.max_epochs is not None for source in blend.leaves)
    paths = tuple(resolve(source.dataset, home()) for source in blend.leaves)
    return Feed(
        mixture=blend,
        datasets=paths,
        digests=tuple(read_manifest(path).digest for path in paths),
        batch=size,
        steps=budget or (epoch if capped else ENDLESS),
        seed=0,
        model=Bare(),
        quarantine=aside(home(), what),
    )


def _of(stage: Stage, batch: int | None) -> tuple[Mixture, int, int]:
    """The mixture of a stage, the samples of a step, and the steps."""
    return stage.data, batch or stage.budget.batch, stage.budget.steps


def _blend(what: str, batch: int | None, words: list[str] | None) -> tuple[Mixture, int, int]:
    """A mixture, the samples of a step, and the steps of one epoch, or of what its caps allow."""
    from bridgework.data.manifest import read_manifest
    from bridgework.data.mixtures import load as load_mixture
    from bridgework.data.mixtures import one_epoch

    blend = override(load_mixture(what), changes(words))
    rows = [read_manifest(resolve(source.dataset, home())).rows for source in blend.leaves]
    return blend, *one_epoch(blend, rows, batch)


def _stage(what: str, tiny: bool, words: list[str] | None) -> Stage | None:
    """The stage that is named, the system's first by default; None where `what` is a mixture.

    Raises SpecError, with a suggestion, for what is neither.
    """
    name, slash, chosen = what.partition("/")
    recipe = name.partition(":")[0]
    if recipe not in recipes() and not _is_system(name):
        if what.endswith(".json") or ":" in name or "/" in what or what in datasets(home()) or what in SYNTHETIC:
            return None
        known = [*recipes(), *datasets(home()), *SYNTHETIC]
        raise SpecError(f"{what!r} is no system, no mixture and no dataset" + suggest(what, known))
    system = override(load(name).tiny() if tiny else load(name), changes(words))
    return system[chosen] if slash else system.stages[0]


def _is_system(name: str) -> bool:
    """Whether a module of the user's own gives a system by this name."""
    if "." not in name or name.startswith(".") or name.endswith(".json"):
        return False
    try:
        load(name)
    except SpecError:
        return False
    return True
