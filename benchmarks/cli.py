"""CPU-seconds of the command line: help, a wrong word, `systems` and `show`, next to `import torch`.

    python -m benchmarks.cli [--rounds N]

Each command runs in a process of its own; the table has the median of the rounds, which alternate.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

PYTHON = (sys.executable, "-c")
CLI = (sys.executable, "-m", "bridgework.cli")
WRONG = "a wrong"  # commands that must fail
COMMANDS: dict[str, tuple[str, ...]] = {
    "import torch": (*PYTHON, "import torch"),
    "import bridgework": (*PYTHON, "import bridgework"),
    "--help": (*CLI, "--help"),
    f"{WRONG} command": (*CLI, "trian"),
    f"{WRONG} system": (*CLI, "train", "lava"),
    f"{WRONG} path": (*CLI, "train", "llava", "--set", "stages.align.optim.peek_lr=1"),
    "systems": (*CLI, "systems"),
    "show clip": (*CLI, "show", "clip"),
    "show llava": (*CLI, "show", "llava"),
}


def cpu_seconds(name: str, command: Sequence[str], home: str) -> float:
    """Return user and system time of one run, with its children.

    Raises RuntimeError if it ended otherwise than expected: what fails early is fast.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        env={"PATH": "/usr/bin:/bin", "BRIDGEWORK_HOME": home, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if bool(done.returncode) is not name.startswith(WRONG):
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as home:
        for _ in range(given.rounds + 1):  # the first round warms the disk's cache
            for name, command in COMMANDS.items():
                times[name].append(cpu_seconds(name, command, home))
    figures = {name: statistics.median(found[1:]) for name, found in times.items()}
    if given.json:
        print(json.dumps(figures, indent=1))
        return
    for name, seconds in figures.items():
        ratio = seconds / figures["import torch"]
        print(f"{name:<20} {seconds:6.2f} s   {ratio:5.2f} x import torch")


if __name__ == "__main__":
    main()
