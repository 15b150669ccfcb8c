"""`bridgework ask`, `import` and `export`: what is done with one model, from the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from bridgework.data.catalog import home
from bridgework.errors import DataError

if TYPE_CHECKING:
    from bridgework.interop.convert import Certificate

importing = typer.Typer(help="Bring in a model from elsewhere.", no_args_is_help=True)
out = Console()

Image = Annotated[
    list[Path] | None, typer.Option("--image", "-i", help="a JPEG, PNG, WebP, GIF or BMP; repeat for several")
]


def ask(
    model: Annotated[str, typer.Argument(help="llava, llava@challenger, llava:3, or an artefact's folder")],
    question: Annotated[str, typer.Argument(help="left out, the model is asked as its training asked")] = "",
    image: Image = None,
    choice: Annotated[list[str] | None, typer.Option(help="choose among these instead of writing; repeat")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="how many to write at most")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    beams: Annotated[int, typer.Option(min=1, help="search this wide; 3 to 5 for captions")] = 1,
) -> None:
    """Ask a model about images, on this machine."""
    from bridgework.data.samples import Part, pair
    from bridgework.inference import Pipeline
    from bridgework.lineage.resolve import artefact_of

    pictures = [_read(path) for path in image or ()]
    pipeline = Pipeline.load(artefact_of(model, home()))
    parts = [Part("user", image=i) for i in range(len(pictures))]
    if question:
        parts.append(Part("user", text="\n" * bool(parts) + question))
    elif len(pictures) == 1:
        parts = pipeline.ask(pair("image", pictures[0], "caption"))[:-1]
    else:
        raise DataError("there is nothing to ask: give a question, or one --image to describe")
    if choice:
        table = Table("choice", "nats", box=None, pad_edge=False)
        for ranked in pipeline.choose(parts, pictures, choice):
            table.add_row(ranked.candidate, f"{ranked.score:+.2f}")
        out.print(table)
        return
    for piece in pipeline.stream(parts, pictures, max_new_tokens=tokens, temperature=temperature, beams=beams):
        out.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
    out.print()


@importing.command("hf")
def import_hf(
    folder: Annotated[Path, typer.Argument(help="what `save_pretrained` wrote")],
    into: Annotated[Path, typer.Argument(metavar="OUT", help="the artefact's folder, which must not exist yet")],
) -> None:
    """Make an artefact of a model in Hugging Face's form, and prove that both give the same outputs."""
    from bridgework.interop import convert

    _show(convert.import_hf(folder, into), into)


def export(
    artefact: Annotated[Path, typer.Argument(metavar="ARTEFACT", help="the folder that a stage or an import wrote")],
    into: Annotated[Path, typer.Argument(metavar="DIR", help="where transformers shall find it")],
    as_: Annotated[str | None, typer.Option("--as", metavar="ARCHITECTURE", help="where several fit")] = None,
) -> None:
    """Write a folder that transformers loads, and prove that both give the same outputs."""
    from bridgework.interop import convert

    _show(convert.export_hf(artefact, into, as_), into)


def _show(certificate: "Certificate", into: Path) -> None:
    out.print(f"{certificate.architecture}  {certificate.parameters:,} parameters, {certificate.tensors} tensors")
    table = Table("output", "largest difference", box=None, pad_edge=False)
    for name, difference in certificate.differences.items():
        table.add_row(name, f"{difference:.1e}")
    out.print(table)
    out.print(f"{into}, with its certificate in parity.json", soft_wrap=True, highlight=False)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give the path of an image") from None
