"""The Ray that a command runs on: one of its own on this machine, or the cluster that RAY_ADDRESS names."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data


@contextmanager
def attached() -> Iterator[None]:
    """Ray for the length of the block, quiet: what a run has to say stands in its bar, its journal and its errors.

    Inside `ray job submit`, RAY_ADDRESS is set. A Ray of our own listens on loopback, has no dashboard, and ends here.
    """
    address = os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else can reach it
        cpus = max(2, os.cpu_count() or 1)  # one for the workers, one for Ray Data
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
