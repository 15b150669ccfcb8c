"""Time to resume in the middle of an epoch, and the missing and repeated samples.

python -m benchmarks.resume              five minutes; --quick: half a minute, fewer rounds
python -m benchmarks.resume --ray        through Ray Data as well
python -m benchmarks.resume --json FILE

Time is from the call that resumes at a step to its decoded batch; the positions take turns. Ours
decodes a complete window (16 steps) before its first batch. Then the epoch is read to its end, and
all its ids are counted. Ours is also read by 1, 2, 3, 4 and 1 workers in turn, switched in the
middle of windows, and compared batch by batch.
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
WIDTH = 120  # of a table that is not printed to a terminal

Resume = Callable[[int], Iterator[Any]]  # from a step on


@dataclass(frozen=True)
class Resumed:
    """One library at one position of the epoch."""

    side: str
    step: int
    first_s: list[float | None]  # to the first batch, in each round; None if there was none
    missing: int  # ids of the epoch that were read neither before nor after resuming
    twice: int
    state_bytes: int  # of the state in a checkpoint, as JSON


def timed(resume: Resume, step: int) -> float | None:
    """Return the seconds to the first batch; None if there is none."""
    gc.collect()
    began = time.perf_counter()
    batches = resume(step)
    first = next(batches, None)
    seconds = time.perf_counter() - began
    if isinstance(batches, Generator):
        batches.close()
    return None if first is None else seconds


def ours(store: Store, name: str, rounds: int) -> Iterator[Resumed]:
    """Measure our reader in process, or through a running Ray."""
    feeding = {"local": in_process, "ray": through_ray}[name]
    epoch = store.rows // BATCH
    places = [int(place * epoch) for place in PLACES]
    times = _in_turn(lambda step: feeding(DECODE, store, step), places, rounds)
    for step in places:
        before, after = feeding(READ, store, 0), feeding(READ, store, step)
        read = _keys(islice(before, step)) + _keys(islice(after, epoch - step))
        yield Resumed(
            name, step, times[step], *_count(read, store), len(json.dumps({"step": step}))
        )


def theirs(store: Store, name: str, rounds: int) -> Iterator[Resumed]:
    peer = PEERS[name]
    folder = store.folder("whole", name, peer.write)
    places = [int(place * store.rows // BATCH) for place in PLACES]
    states = {step: peer.state(folder, step) for step in places}
    times = _in_turn(lambda step: _decoded(peer, folder, states[step]), places, rounds)
    for step in places:
        before = _keys(islice(peer.stream([folder], [store.rows], list, 0), step))
        gc.collect()
        read = before + _keys(peer.resumed(folder, states[step], list))
        yield Resumed(name, step, times[step], *_count(read, store), len(json.dumps(states[step])))


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


def _count(ids: list[str], store: Store) -> tuple[int, int]:
    """Return (missing, repeated) ids of an epoch."""
    return store.rows - len(set(ids)), len(ids) - len(set(ids))


def elastic(store: Store) -> int:
    """Return the number of steps with the same samples for any number of workers.

    Raises AssertionError if a step differs.
    """
    config, epoch = feed(DECODE, store), store.rows // BATCH
    one_worker = [
        Counter(row.key for row in rows)
        for rows in islice(local(config, rank=0, world=1, start=0), epoch)
    ]
    ends = [epoch * number // len(WORLDS) for number in range(len(WORLDS) + 1)]
    for world, (start, end) in zip(WORLDS, pairwise(ends), strict=True):
        ranks = [
            islice(local(config, rank=rank, world=world, start=start), end - start)
            for rank in range(world)
        ]
        for step, parts in enumerate(zip(*ranks, strict=True), start):
            samples = Counter(row.key for rows in parts for row in rows)
            assert samples == one_worker[step], (
                f"step {step} at world {world} has other samples than at world 1"
            )
    ids = sum(one_worker, Counter[str]())
    assert len(ids) == store.rows and set(ids.values()) == {1}, "an id is missing or repeated"
    return epoch


def manifest_bytes(step: int) -> int:
    """Return the size of a checkpoint's manifest, which contains the cursor, without files."""
    with tempfile.TemporaryDirectory() as folder:
        started = checkpoint.begin(Path(folder), step, "attempt0")
        done = checkpoint.complete(
            started, step=step, world=8, attempt="attempt0", fingerprint="f" * 16, keep=1
        )
        return (done.folder / "manifest.json").stat().st_size


def table(found: list[Resumed]) -> Table:
    places = [f"at {place:.0%}, s" for place in PLACES]
    result = Table(
        "", *places, "most / least", "missing", "repeated", "state, bytes", "method", box=None
    )
    for name in dict.fromkeys(each.side for each in found):
        own = [each for each in found if each.side == name]
        times = [[seconds for seconds in each.first_s if seconds is not None] for each in own]
        medians = [statistics.median(seconds) if seconds else None for seconds in times]
        result.add_row(
            name,
            *("nothing left" if median is None else f"{median:.3f}" for median in medians),
            f"{max(filter(None, medians)) / min(filter(None, medians)):.2f}",
            str(max(each.missing for each in own)),
            str(max(each.twice for each in own)),
            str(max(each.state_bytes for each in own)),
            PEERS[name].how_to_resume if name in PEERS else "the plan",
        )
    return result


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
    if not console.is_terminal:
        console.width = WIDTH
    store = Store("clipart", 2_048) if given.quick else Store("photos", 2_048)
    rounds = given.rounds or (2 if given.quick else 7)
    epoch = elastic(Store("clipart", store.rows))
    console.print(
        f"workers {' -> '.join(map(str, WORLDS))}: "
        f"all {epoch} steps of an epoch have the same samples as with one worker"
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
        f"our cursor is the step in a checkpoint's manifest of {manifest} bytes (without files)"
    )
    if given.json:
        runs = [asdict(each) for each in found]
        given.json.write_text(
            json.dumps({"manifest_bytes": manifest, "runs": runs}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
