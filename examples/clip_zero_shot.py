"""CLIP on a laptop: a text tower from scratch, on a frozen image tower, then zero-shot classes.

python -m examples.clip_zero_shot         about 2 minutes on 2 cores; needs `make setup`

EfficientNet-Lite0 is frozen, so its features are computed once. A small text transformer and both
projections learn by contrast from 2,983 drawings with captions. Then the names of 300 concepts are
the classes for another artist's drawings of them, and the names of clip art folders for clip art
with new titles. No classifier is trained. The report is clip_zero_shot.html and .png.
"""

import argparse
import random
from pathlib import Path

from rich.table import Table

from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Sample
from bridgework.evaluation import Retrieval, ZeroShot
from bridgework.evaluation.zero_shot import class_vectors
from bridgework.inference.pipeline import Pipeline
from bridgework.losses import Contrastive
from bridgework.models import CLIPTextConfig, DualEncoderConfig, EfficientNetConfig
from bridgework.recipes.llava import CPU, QUICK_PAIRS, SMOLLM2
from bridgework.system import AdamW, Budget, Mixture, Stage, System
from bridgework.training.driver import train
from bridgework.training.options import RunOptions
from examples.pictures import Card, Line, page, sheet
from examples.report import Report, console, lines, percent, run, shown

STYLE, CLIPART = "examples/data/heldout_style", "examples/data/heldout_clipart"
DRAWINGS, SEED, ROWS = 12, 0, 300
TEMPLATES = ("{}", "a drawing of {}")
SCALE = 1 / 0.07  # of the cosines that are shown as shares
NAMES = Retrieval(name="names", dataset=STYLE, rows=ROWS)
FOLDERS = ZeroShot(name="folders", dataset=CLIPART, rows=ROWS, templates=TEMPLATES)


def system() -> System:
    """A text tower of 4 layers; its tokenizer is that of the quick start's language model."""
    text = CLIPTextConfig(
        width=256, depth=4, heads=4, ffn=1024, vocab=49_152, context=48, eos=2, tokenizer=SMOLLM2
    )
    contrast = Stage(
        name="contrast",
        model=DualEncoderConfig(
            vision=EfficientNetConfig(image_size=224, grid=1), text=text, embed=256
        ),
        trains={"text.*": 1.0, "heads.*": 1.0},
        losses=(Contrastive(temperature=None),),  # learned, as in the paper (2.5)
        data=Mixture(
            sources=QUICK_PAIRS, alpha=0.5, template="caption", max_tokens=48, lanes=16, window=20
        ),
        budget=Budget(steps=160, batch=128, micro=128),
        optim=AdamW(peak_lr=1e-3, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6),
        zero=CPU,
        evals=(NAMES, FOLDERS),
    )
    return System(name="clip", paper="arXiv:2103.00020", stages=(contrast,))


def main(report: Report) -> None:
    held_out = list(open_dataset(STYLE).samples())
    chosen = random.Random(SEED).sample(held_out, DRAWINGS)  # before anything is trained
    with report.part("train", "the text tower learns by contrast", 100, bar=False):
        result = train(
            system(),
            home=report.home,
            run="clip-zero-shot",
            options=RunOptions(workers=0, checkpoint_every=100),
            console=console,
        )["contrast"]
    with report.part("classify", "classes by their names alone", 20):
        figures = result.metrics
        rows = figure_rows(figures)
        table = Table("", *HEADS, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        cards = classified(Pipeline.load(result.artifact), held_out, chosen)
        files = draw_report(report.home, rows, cards)
    report.values |= {"figures": {k: v for k, v in figures.items() if "." in k}}
    report.write()
    console.print()
    lines(
        {
            "pictures": ", ".join(shown(file) for file in files),
            "weights": shown(result.artifact),
            "time": f"{sum(report.seconds.values()) / 60:.1f} minutes",
        }
    )


HEADS = ("first", "among 5", "chance of the first")


def figure_rows(figures: dict[str, float]) -> list[list[str]]:
    return [
        [
            f"class of {ROWS} names, another artist's style",
            percent(figures["names.image_to_text_r1"], ROWS),
            percent(figures["names.image_to_text_r5"], ROWS),
            percent(figures["names.chance_r1"]),
        ],
        [
            "folder of clip art, new titles",
            percent(figures["folders.top1"], ROWS),
            percent(figures["folders.top5"], ROWS),
            percent(figures["folders.chance_top1"]),
        ],
    ]


def classified(pipeline: Pipeline, held_out: list[Sample], chosen: list[Sample]) -> list[Card]:
    """Return each chosen drawing with its three likeliest classes of 300 names."""
    names = [sample.text for sample in held_out]
    classes_CD = class_vectors(pipeline, names, TEMPLATES)
    images_ND = pipeline.embed_images([sample.images[0] for sample in chosen])
    shares_NC = (SCALE * images_ND @ classes_CD.T).softmax(-1)
    cards = []
    for sample, shares_C in zip(chosen, shares_NC, strict=True):
        best = shares_C.topk(3)
        top = [
            Line(names[place], f"{share:.0%}".replace("%", " %"), names[place] == sample.text)
            for share, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        cards.append(Card(sample.images[0], sample.text, top))
    return cards


def draw_report(home: Path, rows: list[list[str]], cards: list[Card]) -> list[Path]:
    title = f"CLIP in minutes: the likeliest of {ROWS} class names"
    text = (
        "A text tower trained from scratch on 2,983 drawings, with a frozen image tower. The "
        f"{DRAWINGS} drawings, by another artist, were drawn by a fixed seed before training. "
        "Figures are of all held-out rows, with 95 % intervals."
    )
    png, html = home / "clip_zero_shot.png", home / "clip_zero_shot.html"
    sheet(title, cards).save(png)
    html.write_text(page(title, text, ["", *HEADS], rows, cards))
    return [png, html]


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    run("clip_zero_shot", main)
