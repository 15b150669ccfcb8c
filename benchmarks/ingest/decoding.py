"""Cost of decoding: our load_image, where libjpeg downscales, against Pillow's full decode.

python -m benchmarks.ingest.decoding           a minute; --json FILE writes the results

JPEGs of quality 90 are resized to 224 pixels, bicubic. A JPEG is decoded at the smallest scale
(1/2, 1/4, 1/8) that leaves both sides at least twice the target, so one of 640 x 480 is decoded at
full scale. CPU-ms per image of the process; the two take turns file by file.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from PIL import features
from rich.console import Console
from rich.table import Table

from benchmarks.ingest import work
from benchmarks.ingest.store import photo
from bridgework.data.images import decode

SIZES = ((320, 240), (640, 480), (1_280, 960), (2_560, 1_920))
FILES = 12  # per size, each read `rounds` times
DECODERS = {"ours": work.ours, "pillow": work.pillow}


def compare(size: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Return CPU-ms per image of each round, by decoder."""
    files = [photo(row, *size) for row in range(FILES)]
    found: dict[str, list[float]] = {name: [] for name in DECODERS}
    for number in range(rounds + 1):  # the first warms up
        spent = dict.fromkeys(DECODERS, 0.0)
        for file in files:
            for name, read in DECODERS.items() if number % 2 else reversed(DECODERS.items()):
                began = time.process_time()
                read(file)
                spent[name] += time.process_time() - began
        if number:
            for name, seconds in spent.items():
                found[name].append(1e3 * seconds / FILES)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    table = Table("file", "decoded at", "ours, CPU-ms", "Pillow, CPU-ms", "ours / Pillow", box=None)
    runs = {}
    for size in SIZES:
        found = compare(size, given.rounds)
        ratios = [ours / other for ours, other in zip(found["ours"], found["pillow"], strict=True)]
        scaled = decode(photo(0, *size), size=work.SIDE).size
        table.add_row(
            "{} x {}".format(*size),
            "{} x {}".format(*scaled),
            *(f"{statistics.median(each):.2f}" for each in found.values()),
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})",
        )
        runs["{}x{}".format(*size)] = found
    Console().print(table)
    if given.json:
        turbo = features.version_feature("libjpeg_turbo")
        given.json.write_text(json.dumps({"libjpeg-turbo": turbo, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
