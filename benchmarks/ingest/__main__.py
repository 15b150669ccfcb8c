"""Our reader against the loaders of other libraries, in paired runs.

All sides have the same images, decoder, tokenizer and collation. mosaicml-streaming is optional.

pip install -e '.[bench]'
pip install --no-deps mosaicml-streaming && pip install Brotli catalogue python-snappy zstd
python -m benchmarks.ingest                    all: about fifty minutes on two idle cores
python -m benchmarks.ingest --quick            less than a minute, not for publication
python -m benchmarks.ingest --json FILE        also write the results of every run
python -m benchmarks.ingest --cases decode --pictures photos --sides local webdataset-0

cases        read: files and texts; decode: + decode, tokenize, collate; mix: + 4 sources by the
             square root of their sizes; pack: + packed sequences, which no other library has
pictures     clipart: WebP of 128 px, 2 kB; photos: JPEG of 640 x 480, 70 kB; large: of 1,280 x 960,
             220 kB (1.5 GB are created once under the home); all decoded to 224, for which ours
             decodes the large at half scale
local        bridgework.data.reader.local, in the training process
ray          the same plan through Ray Data with one reader actor (times exclude ray.init)
LIBRARY-N    with a torch DataLoader with num_workers=N; 0 is in the training process
...-pillow   full decode and resize with Pillow, as is common, instead of bridgework.data.images

Each run is a new process. A round runs every side once, every second round in reverse order; ratios
are within a round. The time is measured for one epoch after the warm-up. Ours shuffles the complete
dataset and resumes anywhere; webdataset and datasets shuffle shards and a buffer of 1,000 samples.
The pause of 5 s of datasets at the end of an epoch is disabled, because these epochs are short.
"""

import argparse
import json
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.ingest.measure import SIDES, Figures, Side, prepare_data, run, run_one
from benchmarks.ingest.peers import PEERS, installed
from benchmarks.ingest.store import PHOTOS, Store
from benchmarks.ingest.work import CASES, Case

Round = dict[str, Figures]  # by the name of the side

ROWS = {"clipart": 4_096, "photos": 2_048, "large": 1_024}
PLAN = {
    "clipart": ("read", "decode", "mix", "pack"),
    "photos": ("read", "decode"),
    "large": ("decode",),
}
WARM = 32  # batches before the measurement; complete windows, because our reader reads by window
QUICK = {"clipart": ("decode", "pack")}
WIDTH = 180  # of tables that are not printed to a terminal
QUICK_ROWS, QUICK_WARM = 512, 16


def sides(pictures: str, case: Case, names: list[str] | None) -> list[Side]:
    """Return the sides that support the case; with `names`, only these."""
    able = [
        side
        for side in SIDES
        if side.peer is None or (not case.packing and installed(PEERS[side.peer]))
    ]
    decoders_differ = case.name == "decode" and pictures in PHOTOS
    return [
        side
        for side in able
        if (decoders_differ or not side.own_decoder) and (names is None or side.name in names)
    ]


def best(figures: Round, *, own_decoder: bool) -> float | None:
    """Return the lowest CPU time of a library that reads in the training process."""
    inside = [
        side for side in SIDES if side.peer and not side.workers and side.own_decoder == own_decoder
    ]
    return min((figures[side.name].cpu_ms for side in inside if side.name in figures), default=None)


def spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return (
        middle
        if len(values) == 1
        else f"{middle} ({min(values):.{digits}f}..{max(values):.{digits}f})"
    )


def ratios(rounds: list[Round], name: str, *, own_decoder: bool) -> str:
    against = [(figures[name].cpu_ms, best(figures, own_decoder=own_decoder)) for figures in rounds]
    return spread([mine / other for mine, other in against if other], 2) if against[0][1] else "-"


def table(title: str, rounds: list[Round]) -> Table:
    """Return a table with median and range over the rounds; ratios are within a round."""
    heads = (
        "CPU-ms / image",
        "/ best in process",
        "/ its own decoder",
        "images / s",
        "first batch, s",
    )
    result = Table(
        "",
        *heads,
        "peak MB: RSS",
        "PSS",
        "missing",
        "repeated",
        "off share, rows",
        box=None,
        title=title,
    )
    for name in rounds[0]:
        runs = [figures[name] for figures in rounds]
        result.add_row(
            name,
            spread([r.cpu_ms for r in runs], 3),
            ratios(rounds, name, own_decoder=False),
            ratios(rounds, name, own_decoder=True),
            spread([r.images_per_s for r in runs], 0),
            spread([r.first_s for r in runs], 2),
            f"{statistics.median(r.rss_mb for r in runs):.0f}",
            f"{statistics.median(r.pss_mb for r in runs):.0f}",
            *("-" if worst is None else f"{worst:.3g}" for worst in _worst(runs)),
        )
    return result


def _worst(runs: list[Figures]) -> list[float | None]:
    each = [(r.missing, r.twice, r.off) for r in runs]
    return [
        None if values[0] is None else max(v for v in values if v is not None)
        for values in zip(*each, strict=True)
    ]


def compare(
    pictures: str, case: Case, names: list[str] | None, *, quick: bool, count: int | None
) -> list[Round]:
    """Run every side of a case in turn, `count` times."""
    store = Store(pictures, QUICK_ROWS if quick else ROWS[pictures])
    selected = sides(pictures, case, names)
    for side in selected:
        prepare_data(side, case, store)
    rounds = []
    for number in range(count or (1 if quick else 3)):
        order = selected if number % 2 == 0 else selected[::-1]
        done = {side.name: run(side, case, store, QUICK_WARM if quick else WARM) for side in order}
        rounds.append({side.name: done[side.name] for side in selected})
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rows, one round, only sides that read in process"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES))
    parser.add_argument("--pictures", nargs="+", choices=tuple(ROWS))
    parser.add_argument("--sides", nargs="+", choices=tuple(side.name for side in SIDES))
    parser.add_argument("--json", type=Path, help="write the results of every run to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_one(given.one)
        return
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    runs: list[dict[str, Any]] = []
    absent = [peer.module for peer in PEERS.values() if not installed(peer)]
    if absent:
        console.print(f"not installed, skipped: {', '.join(absent)}")
    names = given.sides or (
        [s.name for s in SIDES if not s.ray and not s.workers] if given.quick else None
    )
    for pictures, case in [
        (p, c) for p, cases in (QUICK if given.quick else PLAN).items() for c in cases
    ]:
        if pictures in (given.pictures or ROWS) and case in (given.cases or CASES):
            rounds = compare(pictures, CASES[case], names, quick=given.quick, count=given.rounds)
            runs += [
                {
                    "pictures": pictures,
                    "case": case,
                    "round": number,
                    "side": name,
                    **asdict(figures),
                }
                for number, each in enumerate(rounds)
                for name, figures in each.items()
            ]
            if rounds[0]:
                console.print(table(f"{pictures}, {case}", rounds))
            if given.json:
                given.json.write_text(
                    json.dumps({"machine": platform.platform(), "runs": runs}, indent=1) + "\n"
                )


if __name__ == "__main__":
    main()
