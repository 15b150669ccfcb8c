"""`bridgework ask`, `eval`, `import` and `export`: commands for one model."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bridgework.config import config_class, override
from bridgework.data.catalog import home
from bridgework.errors import DataError, SpecError, suggest
from bridgework.mixture import unique
from bridgework.plugins import Plugins

if TYPE_CHECKING:
    from bridgework.data.samples import Part
    from bridgework.hf.convert import Certificate
    from bridgework.inference.pipeline import Pipeline

importing = typer.Typer(help="Import a Hugging Face checkpoint.", no_args_is_help=True)
out, err = Console(), Console(stderr=True)
EVALUATIONS = Plugins(
    kind="evaluation",
    package="bridgework.evaluation",
    methods=("name", "better", "run"),
    example="my_lab.evals",
)
EXAMPLES = 256  # rows of a dataset that are searched for the nearest

Model = Annotated[
    str, typer.Argument(help="llava, llava@challenger, llava:3, or an artifact's folder")
]
Image = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", help="a JPEG, PNG, WebP, GIF or BMP; repeat for several"),
]


@config_class
class Evaluations:
    """Evaluations, whose names are the first part of a dotted path."""

    evals: tuple[Any, ...]

    def __post_init__(self) -> None:
        unique("evaluations", [judge.name for judge in self.evals])


def ask(
    model: Model,
    question: Annotated[str, typer.Argument(help="default: the prompt of its training")] = "",
    image: Image = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="rank these instead of generating; repeat")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="at most so many are generated")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1.0,
            help="sample from the likeliest tokens of this share; 0.9 for captions",
        ),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="of sampling; default: a new one every time")
    ] = None,
    beams: Annotated[
        int, typer.Option(min=1, help="width of beam search; 3 to 5 for captions")
    ] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="of --beams: below 0 prefers short answers, above 0 long ones")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.01, help="above 1 avoids earlier tokens")
    ] = 1.0,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET", help="show its pairs with the nearest images first (RICES)"
        ),
    ] = None,
    shots: Annotated[int, typer.Option(min=1, help="how many pairs of --like")] = 4,
) -> None:
    """Ask a model about images, on this machine."""
    from bridgework.data.samples import Part
    from bridgework.inference.generation import Sampling
    from bridgework.inference.pipeline import Pipeline
    from bridgework.tracking.mlflow_store import artifact_of

    pictures = [_read(path) for path in image or ()]
    pipeline = Pipeline.load(artifact_of(model, home()))
    parts = [Part("user", image=i) for i in range(len(pictures))]
    if like is not None:
        parts, pictures = _after_examples(pipeline, pictures, question, like, shots)
    elif question:
        parts.append(Part("user", text="\n" * bool(parts) + question))
    elif len(pictures) == 1:
        parts = pipeline.inputs.about()
    else:
        raise DataError("there is nothing to ask. Fix: give a question, or one --image to describe")
    choice = choice or list(pipeline.classes)
    if choice:
        table = Table("choice", "score", box=None, pad_edge=False)
        answers = (
            choice if like is None else [f" {text}" for text in choice]
        )  # as those of the examples
        for ranked in pipeline.rank_answers(parts, pictures, answers):
            table.add_row(ranked.candidate.strip(), f"{ranked.score:+.2f}")
        out.print(table)
        return
    how = Sampling(max_new_tokens=tokens, temperature=temperature, top_p=top_p, seed=seed, beams=beams,
                   length_penalty=length_penalty, repetition_penalty=repetition_penalty)  # fmt: skip
    for piece in pipeline.stream(parts, pictures, **how):
        out.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
    out.print()


def _after_examples(
    pipeline: "Pipeline", pictures: list[bytes], question: str, dataset: str, shots: int
) -> tuple[list["Part"], list[bytes]]:
    """Return the prompt of Flamingo: the nearest pairs of a dataset, then the only image."""
    from bridgework.evaluation.few_shot import FewShot

    if len(pictures) != 1:
        raise DataError(f"--like shows examples for one --image, got {len(pictures)}")
    drawn = FewShot(name="like", dataset=dataset, shots=shots, rows=max(EXAMPLES, shots + 1))
    asked = replace(drawn, prompts=(question,)) if question else drawn
    return asked.demonstrate(pipeline, pictures[0], home())


def evaluate(
    model: Model,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="KIND:DATASET", help="instead of its own, e.g. vqa:vqav2-val"),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME.FIELD=VALUE", help="vqa.rows=200")
    ] = None,
) -> None:
    """Evaluate a model with its stage's evaluations, or with others; figures go to <home>/evals."""
    from bridgework.inference.pipeline import Pipeline
    from bridgework.tracking.mlflow_store import artifact_of

    chosen = [_judge(words) for words in on or ()]
    pipeline = Pipeline.load(artifact_of(model, home()))
    judges = _changed(Evaluations(evals=tuple(chosen or pipeline.stage.evals)), set_)
    if not judges.evals:
        raise SpecError(
            f"stage {pipeline.stage.name} of {model} has no evaluations. Fix: add some to its "
            "recipe's "
            f"`evals`, or give --on KIND:DATASET, where KIND is one of {', '.join(_kinds())}"
        )
    table = Table("figure", "value", box=None, pad_edge=False)
    for judge in judges.evals:
        result = judge.run(pipeline, home())
        for key, value in result.metrics.items():
            table.add_row(key, f"{value:.4g}")
        for name, picture in result.pictures.items():
            file = home() / "evals" / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
            err.print(f"picture   {file}", soft_wrap=True)
    out.print(table)


def _kinds() -> dict[str, Any]:
    """Return the evaluations that ship, by their default names."""
    return {cls.name: cls for cls in EVALUATIONS.classes()}


def _judge(words: str) -> Any:
    kind, colon, dataset = words.partition(":")
    if not colon or not dataset:
        raise SpecError(
            f"--on {words!r} is not of the form KIND:DATASET, e.g. vqa:vqav2-val or "
            "retrieval:../my/pairs"
        )
    if "." in kind:
        return EVALUATIONS.load_class(kind)(dataset=dataset)
    known = _kinds()
    if kind not in known:
        raise SpecError(f"there is no evaluation {kind!r}" + suggest(kind, known))
    return known[kind](dataset=dataset)


def _changed(judges: Evaluations, words: list[str] | None) -> Evaluations:
    for word in words or ():
        if "=" not in word:
            raise SpecError(
                f"{word!r} is not of the form NAME.FIELD=VALUE, e.g. --set vqa.rows=200"
            )
    return override(
        judges,
        {f"evals.{path}": value for path, _, value in (w.partition("=") for w in words or ())},
    )


@importing.command("hf")
def import_hf(
    folder: Annotated[Path, typer.Argument(help="what `save_pretrained` wrote")],
    into: Annotated[
        Path, typer.Argument(metavar="OUT", help="the artifact's folder, which must not exist yet")
    ],
) -> None:
    """Write the artifact of a Hugging Face model, and prove that both give the same outputs."""
    from bridgework.hf import convert

    _show(convert.import_hf(folder, into), into)


def export(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="the folder that a stage or an import wrote")
    ],
    into: Annotated[Path, typer.Argument(metavar="DIR", help="where transformers shall find it")],
    as_: Annotated[
        str | None, typer.Option("--as", metavar="ARCHITECTURE", help="where several fit")
    ] = None,
) -> None:
    """Write a folder that transformers loads, and prove that both give the same outputs."""
    from bridgework.hf import convert

    _show(convert.export_hf(artifact, into, as_), into)


def _show(certificate: "Certificate", into: Path) -> None:
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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give the path of an image"
        ) from None
