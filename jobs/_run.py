"""What the jobs share: `ray job submit` unpacks the working directory, where the package may not be installed."""

import os
import sys
from pathlib import Path

SOURCE = str(Path(__file__).parents[1] / "platform")


def main(command: str) -> None:
    """`bridgework COMMAND` with the words of this job; workers of the job find the package by PYTHONPATH."""
    sys.path.insert(0, SOURCE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
    from bridgework.cli import main as bridgework

    sys.argv = ["bridgework", command, *sys.argv[1:]]
    bridgework()
