"""Our reader against other libraries' loaders: the same pictures, decoder, tokenizer and collation, in paired runs.

pip install -e '.[bench]'
pip install --no-deps mosaicml-streaming && pip install Brotli catalogue python-snappy zstd      optional
python -m benchmarks.ingest                    all comparisons: about fifty minutes on two idle cores
python -m benchmarks.ingest --quick            a look, in less than a minute: no figures to quote
python -m benchmarks.ingest --json FILE        every run's figures as well
python -m benchmarks.ingest --cases decode --pictures photos --sides local webdataset-0

cases        read: files and texts; decode: + decode, tokenize, collate; mix: + 4 sources by the square root of their
             sizes; pack: + samples that share a sequence, which no other library has
pictures     clipart: WebP of 128 px, 2 kB; photos: JPEG of 640 x 480, 70 kB; large: of 1,280 x 960, 220 kB (1.5 GB
             are made once under the home); all decoded to 224, at which ours decodes the large at half their scale
local        bridgework.data.reader.local, in the process that trains
ray          the same plan through Ray Data with one reader actor (ray.init is not in its times)
LIBRARY-N    under a torch DataLoader with num_workers=N; 0 is in the process that trains
...-pillow   decodes whole and resizes, as its users write it, and not by bridgework.data.images

Each run is a process of its own; a round runs every side once, the next in reverse order; ratios are taken inside a
round. The clock runs for one epoch's length, from the end of the warm-up on. Ours shuffles the whole dataset and
resumes anywhere; webdataset and datasets shuffle shards and a buffer of 1,000 samples. The pause of 5 s that datasets
makes at the end of an epoch is off: it would weigh on epochs as short as these.
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

from benchmarks.ingest.measure import SIDES, Figures, Side, one, run, stored
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
WARM = 32  # batches before the clock starts; like an epoch whole windows of ours, which reads by the window
QUICK = {"clipart": ("decode", "pack")}
WIDTH = 180  # of the tables in a file
QUICK_ROWS, QUICK_WARM = 512, 16


def sides(pictures: str, case: Case, names: list[str] | None) -> list[Side]:
    """Those that can do the case, of `names` where any are given."""
    able = [
        side
        for side in SIDES
        if side.peer is None or (not case.packing and installed(PEERS[side.peer]))
    ]
    whole = (
        case.name == "decode" and pictures in PHOTOS
    )  # elsewhere the two decoders do the same work
    return [
        side
        for side in able
        if (whole or not side.own_decoder) and (names is None or side.name in names)
    ]


def best(figures: Round, *, own_decoder: bool) -> float | None:
    """The least CPU of a library that reads in the process that trains."""
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
    """Median and range over the rounds; ratios are those of the pairs."""
    heads = (
        "CPU-ms / image",
        "/ best in process",
        "/ its own decoder",
        "images / s",
        "first batch, s",
    )
    shown = Table(
        "",
        *heads,
        "peak MB: RSS",
        "PSS",
        "missing",
        "twice",
        "off share, rows",
        box=None,
        title=title,
    )
    for name in rounds[0]:
        runs = [figures[name] for figures in rounds]
        shown.add_row(
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
    return shown


def _worst(runs: list[Figures]) -> list[float | None]:
    each = [(r.missing, r.twice, r.off) for r in runs]
    return [
        None if values[0] is None else max(v for v in values if v is not None)
        for values in zip(*each, strict=True)
    ]


def compared(
    pictures: str, case: Case, names: list[str] | None, *, quick: bool, count: int | None
) -> list[Round]:
    """Every side of a case in turn, `count` times."""
    store = Store(pictures, QUICK_ROWS if quick else ROWS[pictures])
    turns = sides(pictures, case, names)
    for side in turns:
        stored(side, case, store)
    rounds = []
    for number in range(count or (1 if quick else 3)):
        order = turns if number % 2 == 0 else turns[::-1]
        done = {side.name: run(side, case, store, QUICK_WARM if quick else WARM) for side in order}
        rounds.append({side.name: done[side.name] for side in turns})
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rows, one round, sides that read in process"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES))
    parser.add_argument("--pictures", nargs="+", choices=tuple(ROWS))
    parser.add_argument("--sides", nargs="+", choices=tuple(side.name for side in SIDES))
    parser.add_argument("--json", type=Path, help="a file for the figures of every run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one)
        return
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    runs: list[dict[str, Any]] = []
    absent = [peer.module for peer in PEERS.values() if not installed(peer)]
    if absent:
        console.print(f"not installed, so left out: {', '.join(absent)}")
    names = given.sides or (
        [s.name for s in SIDES if not s.ray and not s.workers] if given.quick else None
    )
    for pictures, case in [
        (p, c) for p, cases in (QUICK if given.quick else PLAN).items() for c in cases
    ]:
        if pictures in (given.pictures or ROWS) and case in (given.cases or CASES):
            rounds = compared(pictures, CASES[case], names, quick=given.quick, count=given.rounds)
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
