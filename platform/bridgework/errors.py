"""What can go wrong, as one tree; every leaf is also the builtin that a caller would expect.

BridgeworkError
├── SpecError      (ValueError)    a recipe, a dotted path or a value on the command line
├── DataError      (ValueError)    a dataset, a manifest, a shard or a sample
├── WeightsError   (ValueError)    pretrained weights, an artifact, a parameter's shape
├── RunError       (RuntimeError)  a run, a checkpoint, a worker
│   └── Interrupted                a run that a signal stopped, after a checkpoint
├── TrackingError  (RuntimeError)  the tracker's answer: no such run, model, alias
└── ResourceError  (OSError)       the machine: memory, disk, a port, a missing program

A message says what was given, what is allowed and what to do, in one line.
"""

from collections.abc import Iterable
from difflib import get_close_matches

MESSAGE_CHARS = 8_000


class BridgeworkError(Exception):
    """The root of all errors that bridgework raises on purpose; the command line prints it without a traceback.

    Of a message longer than MESSAGE_CHARS the middle is left out, and it says so.
    """

    def __init__(self, message: str) -> None:
        if len(message) > MESSAGE_CHARS:
            kept = (
                MESSAGE_CHARS - 100
            ) // 2  # with what is said of the rest, no longer than a message may be
            left_out = len(message) - 2 * kept
            message = f"{message[:kept]} .. [{left_out:,} characters] .. {message[-kept:]}"
        super().__init__(message)


class SpecError(BridgeworkError, ValueError):
    """A recipe, a dotted path or a value is wrong."""


class DataError(BridgeworkError, ValueError):
    """A dataset, a manifest, a shard or a sample is wrong."""


class WeightsError(BridgeworkError, ValueError):
    """Pretrained weights or an artifact do not fit the model."""


class RunError(BridgeworkError, RuntimeError):
    """A run cannot start, go on or be resumed."""


class Interrupted(RunError):
    """A signal stopped a run; its last checkpoint is of the step before."""


class TrackingError(BridgeworkError, RuntimeError):
    """The tracker does not know a run, a model, a version or an alias."""


class ResourceError(BridgeworkError, OSError):
    """The machine lacks something: memory, disk, a free port, a program."""


def suggest(given: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest allowed name, else the list of allowed names."""
    names = sorted(set(allowed))
    near = get_close_matches(given, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
