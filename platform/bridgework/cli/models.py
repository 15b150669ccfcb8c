"""Commands for one model: `bridgework ask`, `import` and `export`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from bridgework.cli.options import Model
from bridgework.data.catalog import home
from bridgework.errors import DataError

if TYPE_CHECKING:
    from bridgework.data.samples import Part
    from bridgework.hf.convert import Certificate
    from bridgework.inference.pipeline import Pipeline

importing = typer.Typer(help="Import a model of Hugging Face transformers.", no_args_is_help=True)
out, err = Console(), Console(stderr=True)
EXAMPLES = 256  # rows of --like among which the nearest are searched

Image = Annotated[
    list[Path] | None,
    typer.Option(
        "--image", "-i", help="Image file: JPEG, PNG, WebP, GIF or BMP. Repeat for several."
    ),
]


def ask(
    model: Model,
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION",
            help="Question about the images.",
            show_default="the prompt of the model's training",
        ),
    ] = "",
    image: Image = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(help="Score this answer instead of generating one. Repeat for each choice."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of generated tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1.0,
            help="Sample from the likeliest tokens with this total probability; 0.9 for captions.",
        ),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sampling.", show_default="a new one every time")
    ] = None,
    beams: Annotated[
        int, typer.Option(min=1, help="Beams of a beam search; 3 to 5 for captions.")
    ] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="With --beams: below 0 prefers short answers, above 0 long ones.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.01, help="Penalty of repeated tokens; above 1 avoids them.")
    ] = 1.0,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Prompt with the pairs of this dataset whose images are nearest (RICES).",
        ),
    ] = None,
    shots: Annotated[int, typer.Option(min=1, help="Number of pairs of --like.")] = 4,
) -> None:
    """Ask a model about images and print its answer."""
    from bridgework.inference.generation import Sampling
    from bridgework.inference.pipeline import Pipeline
    from bridgework.inference.preprocess import read_file
    from bridgework.tracking.mlflow_store import artifact_of

    images = [read_file(path) for path in image or ()]
    pipeline = Pipeline.load(artifact_of(model, home()))
    if like is None:
        parts = pipeline.inputs.question(question, len(images))
    else:
        parts, images = _few_shot(pipeline, images, question, like, shots)
    choice = choice or list(pipeline.classes)
    if choice:
        table = Table("choice", "score", box=None, pad_edge=False)
        # few-shot examples have a space before the answer
        answers = choice if like is None else [f" {text}" for text in choice]
        for ranked in pipeline.rank_answers(parts, images, answers):
            table.add_row(ranked.candidate.strip(), f"{ranked.score:+.2f}")
        out.print(table)
        return
    sampling = Sampling(
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        beams=beams,
        length_penalty=length_penalty,
        repetition_penalty=repetition_penalty,
    )
    for piece in pipeline.stream(parts, images, **sampling):
        out.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
    out.print()


def _few_shot(
    pipeline: "Pipeline", images: list[bytes], question: str, dataset: str, shots: int
) -> tuple[list["Part"], list[bytes]]:
    """Return Flamingo's few-shot prompt: the nearest pairs of a dataset, then the image."""
    from bridgework.evaluation.few_shot import FewShot

    if len(images) != 1:
        raise DataError(f"--like shows examples for one --image. Got {len(images)}; expected 1")
    few_shot = FewShot(name="like", dataset=dataset, shots=shots, rows=max(EXAMPLES, shots + 1))
    if question:
        few_shot = replace(few_shot, prompts=(question,))
    return few_shot.demonstrate(pipeline, images[0], home())


@importing.command("hf")
def import_hf(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Checkpoint, as `save_pretrained` writes it.")
    ],
    into: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder of the artifact; must not exist.")
    ],
) -> None:
    """Import a Hugging Face checkpoint as an artifact, and verify that the outputs are equal."""
    from bridgework.hf import convert

    _print_certificate(convert.import_hf(folder, into), into)


def export(
    artifact: Annotated[
        Path,
        typer.Argument(metavar="ARTIFACT", help="Folder of an artifact (a stage or an import)."),
    ],
    into: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder for transformers; must not exist.")
    ],
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="ARCHITECTURE",
            help="Architecture of transformers.",
            show_default="the only one that fits",
        ),
    ] = None,
) -> None:
    """Export an artifact as a transformers checkpoint, and verify that the outputs are equal."""
    from bridgework.hf import convert

    _print_certificate(convert.export_hf(artifact, into, as_), into)


def _print_certificate(certificate: "Certificate", into: Path) -> None:
    out.print(
        f"{certificate.architecture}  {certificate.parameters:,} parameters, "
        f"{certificate.tensors} tensors"
    )
    table = Table("output", "largest difference", box=None, pad_edge=False)
    for name, difference in certificate.differences.items():
        table.add_row(name, f"{difference:.1e}")
    for name, text in certificate.texts.items():
        table.add_row(name, f"{sum(map(len, text.ours))} ids, equal")
    table.add_row("config", f"{certificate.fields} fields, equal")
    out.print(table)
    out.print(f"{into}, with its certificate in parity.json", soft_wrap=True, highlight=False)
