"""Entry point of all jobs.

`ray job submit` unpacks the working directory; the package may not be installed on the cluster.
"""

import os
import sys
from pathlib import Path

SOURCE = str(Path(__file__).parents[1] / "platform")


def main(*command: str) -> None:
    """Run `bridgework COMMAND` with the arguments of this job.

    The workers of the job import the package from PYTHONPATH.
    """
    sys.path.insert(0, SOURCE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
    from bridgework.cli import main as bridgework

    sys.argv = ["bridgework", *command, *sys.argv[1:]]
    bridgework()
