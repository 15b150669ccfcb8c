"""How long it takes to go on in the middle of an epoch, and whether anything is lost or comes twice.

python -m benchmarks.resume              five minutes; --quick: half a minute, no figures to quote
python -m benchmarks.resume --ray        through Ray Data as well
python -m benchmarks.resume --json FILE

Time is from the call that goes on at a step to its batch, decoded; positions take turns. Ours decodes a whole window
(16 steps) before it gives the first. Then the epoch is read to its end, and its ids are counted, with those before.
Ours is also read by 1, 2, 3, 4 workers and 1 again, handed over in the middle of windows, and compared batch by batch.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ingest import work
from benchmarks.ingest.feeding import feed, in_process, start_ray, through_ray
from benchmarks.ingest.peers import PEERS, Peer, installed
from benchmarks.ingest.store import Store
from benchmarks.ingest.work import BATCH, DECODE, READ, Work, keys
from bridgework.data.reader import local
from bridgework.training import checkpoint

PLACES = (0.0, 0.1, 0.5, 0.9)  # of an epoch
WORLDS = (1, 2, 3, 4, 1)

Resume = Callable[[int], Iterator[Any]]  # from a step on


@dataclass(frozen=True)
class Resumed:
    """One side at one place of the epoch."""

    side: str
    step: int
    first_s: list[float | None]  # to the first batch, in each round; None where none came
    missing: int  # ids of the epoch that came neither before nor behind
    twice: int
    state_bytes: int  # of what a checkpoint keeps, as JSON


def timed(resume: Resume, step: int) -> float | None:
    """Seconds to the first batch; None if there is none."""
    gc.collect()
    began = time.perf_counter()
    batches = resume(step)
    first = next(batches, None)
    seconds = time.perf_counter() - began
    if isinstance(batches, Generator):
        batches.close()
    return None if first is None else seconds


def ours(store: Store, name: str, rounds: int) -> Iterator[Resumed]:
    """In process, or through Ray, which runs already."""
    feeding = {"local": in_process, "ray": through_ray}[name]
    epoch = store.rows // BATCH
    places = [int(place * epoch) for place in PLACES]
    times = _in_turn(lambda step: feeding(DECODE, store, step), places, rounds)
    for step in places:
        before, behind = feeding(READ, store, 0), feeding(READ, store, step)
        came = _keys(islice(before, step)) + _keys(islice(behind, epoch - step))
        yield Resumed(name, step, times[step], *_lost(came, store), len(json.dumps({"step": step})))


def theirs(store: Store, name: str, rounds: int) -> Iterator[Resumed]:
    peer = PEERS[name]
    folder = store.folder("whole", name, peer.write)
    places = [int(place * store.rows // BATCH) for place in PLACES]
    states = {step: peer.state(folder, step) for step in places}
    times = _in_turn(lambda step: _decoded(peer, folder, states[step]), places, rounds)
    for step in places:
        before = _keys(islice(peer.stream([folder], [store.rows], list, 0), step))
        gc.collect()
        came = before + _keys(peer.resumed(folder, states[step], list))
        yield Resumed(name, step, times[step], *_lost(came, store), len(json.dumps(states[step])))


def _decoded(peer: Peer, folder: Path, state: Any) -> Iterator[Any]:
    return peer.resumed(folder, state, Work(DECODE, work.ours))


def _in_turn(resume: Resume, places: list[int], rounds: int) -> dict[int, list[float | None]]:
    timed(resume, places[0])  # imports and caches
    times: dict[int, list[float | None]] = {step: [] for step in places}
    for number in range(rounds):
        for step in places if number % 2 == 0 else places[::-1]:
            times[step].append(timed(resume, step))
    return times


def _keys(batches: Iterator[Any]) -> list[str]:
    return [key for batch in batches for key in keys(batch)]


def _lost(came: list[str], store: Store) -> tuple[int, int]:
    return store.rows - len(set(came)), len(came) - len(set(came))


def elastic(store: Store) -> int:
    """Steps of an epoch whose samples are one worker's, whoever reads them. Raises AssertionError where they differ."""
    described, epoch = feed(DECODE, store), store.rows // BATCH
    alone = [
        Counter(row.key for row in rows)
        for rows in islice(local(described, rank=0, world=1, start=0), epoch)
    ]
    ends = [epoch * number // len(WORLDS) for number in range(len(WORLDS) + 1)]
    for world, (start, end) in zip(WORLDS, pairwise(ends), strict=True):
        ranks = [
            islice(local(described, rank=rank, world=world, start=start), end - start)
            for rank in range(world)
        ]
        for step, parts in enumerate(zip(*ranks, strict=True), start):
            together = Counter(row.key for rows in parts for row in rows)
            assert together == alone[step], (
                f"step {step} at world {world} has other samples than at world 1"
            )
    whole = sum(alone, Counter[str]())
    assert len(whole) == store.rows and set(whole.values()) == {1}, "an id is missing or came twice"
    return epoch


def manifest_bytes(step: int) -> int:
    """Of a checkpoint's manifest, which holds the cursor, where no file is beside it."""
    with tempfile.TemporaryDirectory() as folder:
        place = checkpoint.begin(Path(folder), step, "attempt0")
        kept = checkpoint.complete(
            place, step=step, world=8, attempt="attempt0", fingerprint="f" * 16, keep=1
        )
        return (kept.folder / "manifest.json").stat().st_size


def table(found: list[Resumed]) -> Table:
    places = [f"at {place:.0%}, s" for place in PLACES]
    shown = Table("", *places, "most / least", "missing", "twice", "state, bytes", "how", box=None)
    for name in dict.fromkeys(each.side for each in found):
        own = [each for each in found if each.side == name]
        times = [[seconds for seconds in each.first_s if seconds is not None] for each in own]
        medians = [statistics.median(seconds) if seconds else None for seconds in times]
        shown.add_row(
            name,
            *("nothing left" if median is None else f"{median:.3f}" for median in medians),
            f"{max(filter(None, medians)) / min(filter(None, medians)):.2f}",
            str(max(each.missing for each in own)),
            str(max(each.twice for each in own)),
            str(max(each.state_bytes for each in own)),
            PEERS[name].how_to_resume if name in PEERS else "the plan",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    store = Store("clipart", 2_048) if given.quick else Store("photos", 2_048)
    rounds = given.rounds or (2 if given.quick else 7)
    epoch = elastic(Store("clipart", store.rows))
    console.print(
        f"workers {' -> '.join(map(str, WORLDS))}: all {epoch} steps of an epoch as one worker reads them"
    )
    found = list(ours(store, "local", rounds))
    for name in (name for name, peer in PEERS.items() if installed(peer)):
        found += theirs(store, name, rounds)
    if given.ray:
        start_ray()
        found += ours(store, "ray", rounds)
    console.print(table(found))
    manifest = manifest_bytes(epoch)
    console.print(
        f"our cursor is the step in a checkpoint's manifest, which has {manifest} bytes without its files"
    )
    if given.json:
        runs = [asdict(each) for each in found]
        given.json.write_text(
            json.dumps({"manifest_bytes": manifest, "runs": runs}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
