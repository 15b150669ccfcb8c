"""CapFilt on planted noise (BLIP, arXiv:2201.12086, 3.3): a filter drops captions that are wrong.

python -m examples.capfilt         about 2 minutes on 2 cores; needs `make setup`

Flags of three stripes have captions such as "red blue white". A tiny BLIP is trained on true pairs
of one half of the flags. In the other half, which it never saw, 30 % of the captions are moved to
another flag, as a web page may show an image with a wrong text. CapFilt scores every pair with the
filter and keeps those above a threshold. The report (capfilt.html and .png) shows kept and dropped
captions, drawn by a fixed seed. `python -m benchmarks.capfilt` compares thresholds.
"""

import argparse
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from rich.table import Table

from benchmarks.capfilt import MISMATCHED, SPEC, STEPS, flag, swapped, trained
from bridgework.data.dataset import open_dataset, write
from bridgework.data.samples import Sample
from bridgework.data.synthetic import COLORS
from examples.pictures import Card, Line, page, sheet
from examples.report import Report, console, lines, percent, run, shown

THRESHOLD = -2.0  # logit of the filter; 0 is a probability of one half
SHOWN, SEED = 6, 0  # flags of each kind on the picture
HEADS = ("kept", "dropped")


def main(report: Report) -> None:
    folder = report.home / "capfilt"
    with report.part("plant", f"{MISMATCHED:.0%} wrong captions".replace("%", " %"), 5):
        web, wrong = plant(folder)
    with report.part("train", "captioner and filter, on true pairs", 80):
        models = {
            name: trained(name, str(folder / "true"), folder, steps)
            for name, steps in (("captioner", 2), ("filter", STEPS))
        }
    with report.part("filter", "every pair gets a score", 20):
        kept = filtered(folder, models)
        rows = figure_rows(web, wrong, kept)
        table = Table("", *HEADS, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        right = [sample for sample in web if sample.key not in wrong]
        precision = sum(sample.key in kept for sample in right) / max(1, len(kept))
        recall = sum(sample.key in kept for sample in right) / len(right)
        files = draw_report(report.home, rows, cards(web, wrong, kept))
    report.values |= {"precision": precision, "recall": recall, "kept": len(kept)}
    report.write()
    console.print()
    lines(
        {
            "correct if kept": f"{percent(precision, len(kept))}, before the filter "
            f"{percent(len(right) / len(web), len(web))}",
            "correct and kept": percent(recall, len(right)),
            "pictures": ", ".join(shown(file) for file in files),
            "time": f"{sum(report.seconds.values()) / 60:.1f} minutes",
        }
    )


def plant(folder: Path) -> tuple[list[Sample], set[str]]:
    """Write the true pairs and the web's; returns the web's pairs and the keys of wrong ones."""
    flags = [flag(colors) for colors in permutations(COLORS, 3)]
    random.Random(1).shuffle(flags)
    half = len(flags) // 2
    web, wrong = swapped(flags[half:])
    for name, samples in (("true", flags[:half]), ("web", web)):
        if not (folder / name / "manifest.json").exists():
            write(
                samples,
                str(folder / name),
                source="flags",
                license="CC0-1.0",
                made_by="examples.capfilt",
            )
    console.print(f"{half} true pairs to learn from, {len(web)} pairs to filter")
    return web, wrong


def filtered(folder: Path, models: Mapping[str, Path]) -> set[str]:
    """Run CapFilt on the web's pairs; returns the keys of those whose own text is kept."""
    dest = folder / "made"
    shutil.rmtree(dest, ignore_errors=True)
    spec = replace(SPEC, sources=(str(folder / "web"),), threshold=THRESHOLD)
    spec.run(models, str(dest), home=folder, say=lambda text: console.print(text, markup=False))
    return {
        sample.provenance["capfilt.key"]
        for sample in open_dataset(str(dest)).samples()
        if sample.provenance["capfilt.kept"] == "web"
    }


def figure_rows(web: list[Sample], wrong: set[str], kept: set[str]) -> list[list[str]]:
    rows = []
    for name, keys in (
        ("right captions", {s.key for s in web} - wrong),
        ("planted, wrong captions", wrong),
    ):
        rows.append([name, percent(len(keys & kept) / len(keys), len(keys))])
        rows[-1].append(percent(len(keys - kept) / len(keys), len(keys)))
    return rows


def cards(web: list[Sample], wrong: set[str], kept: set[str]) -> list[Card]:
    """Return flags with right and with wrong captions, drawn by a seed, and their decisions."""
    draw = random.Random(SEED)
    found = []
    for planted in (False, True):
        group = [sample for sample in web if (sample.key in wrong) is planted]
        for sample in draw.sample(group, SHOWN):
            decision = "kept" if sample.key in kept else "dropped"
            good = (sample.key in kept) is not planted
            true = sample.key.replace("-", " ")
            verdict = [Line(decision, "planted" if planted else "true pair", good)]
            if planted:
                verdict.append(Line(f"the flag is {true}"))
            found.append(Card(sample.images[0], sample.text, verdict))
    return found


def draw_report(home: Path, rows: list[list[str]], found: list[Card]) -> list[Path]:
    title = "CapFilt: planted wrong captions, kept and dropped"
    text = (
        "Captions of flags, of which 30 % were moved to another flag. A check: the filter decided "
        f"right. The {len(found)} flags were drawn by a fixed seed. Figures are of all flags, with "
        "95 % intervals."
    )
    png, html = home / "capfilt.png", home / "capfilt.html"
    sheet(title, found).save(png)
    html.write_text(page(title, text, ["", *HEADS], rows, found))
    return [png, html]


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    run("capfilt", main)
