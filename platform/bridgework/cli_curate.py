"""`bridgework curate`: make a dataset of another one by what models know."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from bridgework.data.catalog import home
from bridgework.errors import SpecError
from bridgework.spec import override

if TYPE_CHECKING:
    from bridgework.curation.verdicts import Counts

curate = typer.Typer(help="Datasets from datasets: what models write, keep and drop.", no_args_is_help=True)
out, err = (Console(stderr=stderr, markup=False, highlight=False) for stderr in (False, True))

Model = Annotated[str, typer.Option(help="an artefact's folder, or a registered model")]


@curate.command()
def capfilt(
    source: Annotated[str, typer.Argument(help="pairs from the web: a folder, a URL or a name")],
    dest: Annotated[str, typer.Argument(help="a folder or a URL; a bare name goes to <home>/datasets")],
    captioner: Model,
    filter_: Annotated[str, typer.Option("--filter", help="likewise, of a stage with a matching head")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="e.g. top_p=0.8")] = None,
    workers: Annotated[int, typer.Option(min=0, help="actors of Ray; 0 works in this process")] = 0,
    explain: Annotated[bool, typer.Option("--explain", help="draw what was kept and what was dropped")] = False,
) -> None:
    """Caption every image, judge both texts, keep what fits (BLIP's CapFilt). Run again, it goes on."""
    from contextlib import nullcontext

    from bridgework.curation import CapFilt
    from bridgework.curation.verdicts import Counts
    from bridgework.lineage.resolve import artefact_of

    spec = override(CapFilt(captioner="captioner", filter="filter", sources=(source,)), _changes(set_))
    bare = "/" not in dest and "\\" not in dest and not dest.startswith(".")
    place = str(home() / "datasets" / dest) if bare else dest
    named = zip(spec.uses, (captioner, filter_), strict=True)
    artefacts = {stage: Path(artefact_of(words, home())) for stage, words in named}
    if workers:
        from bridgework.training.cluster import attached
    with attached() if workers else nullcontext():
        made = spec.run(artefacts, place, home=home(), workers=workers, say=err.print)
    _show(Counts(**made.parameters["counts"]), spec.threshold)
    out.print(place, soft_wrap=True)
    if explain:
        from bridgework.curation.explain import sheet

        picture = home() / "curated" / f"{Path(place).name}-{made.digest[:8]}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        sheet(spec, artefacts, place, home()).save(picture)
        out.print(picture, soft_wrap=True)


def _changes(words: list[str] | None) -> dict[str, str]:
    pairs = [word.partition("=") for word in words or []]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise SpecError(f"--set takes FIELD=VALUE, e.g. top_p=0.8; got {wrong[0]!r}")
    return {key.strip(): value for key, _, value in pairs}


def _show(counts: "Counts", threshold: float) -> None:
    limit = f"logit above {threshold:g}"
    lost = counts.images - counts.written - counts.unread - counts.repeated
    table = Table("", "texts", "why", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, number, why in (
        ("web, kept", counts.web, limit),
        ("web, dropped", counts.images - counts.web, f"not {limit}"),
        ("written, kept", counts.written, limit),
        ("written, dropped", lost, f"not {limit}"),
        ("", counts.repeated, "the kept web text again"),
        ("", counts.unread, "nothing in it to read"),
        ("images, dropped", counts.dropped, f"of {counts.images:,}: no text was kept"),
        ("rows, put aside", counts.bad, "no pair, or no image: see the quarantine"),
    ):
        table.add_row(name, f"{number:,}", why)
    out.print(table)
