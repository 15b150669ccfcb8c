"""The tree of errors: every leaf is also the builtin exception that a caller would expect.

BridgeworkError
├── SpecError      (ValueError)    a recipe, a dotted path or a command-line value
├── DataError      (ValueError)    a dataset, a manifest, a shard or a sample
├── WeightsError   (ValueError)    pretrained weights, an artifact, a parameter's shape
├── RunError       (RuntimeError)  a run, a checkpoint, a worker
│   └── Interrupted                a run that a signal stopped, after a checkpoint
│       └── Paused                 a run that has reached its --until, after a checkpoint
├── TrackingError  (RuntimeError)  the tracker: no answer, or an unknown run, model or alias
└── ResourceError  (OSError)       the machine: memory, disk, a port, a missing program

A message is one line: `<where>: <what happened>. Got X; expected Y. Fix: Z.`
"""

from collections.abc import Iterable
from difflib import get_close_matches

MESSAGE_CHARS = 8_000


class BridgeworkError(Exception):
    """Root of all errors that bridgework raises on purpose.

    The command line prints it without a traceback. The middle of a message longer than
    MESSAGE_CHARS is replaced by a note of its length.
    """

    def __init__(self, message: str) -> None:
        if len(message) > MESSAGE_CHARS:
            half = (MESSAGE_CHARS - 100) // 2  # 100: room for the note
            left_out = len(message) - 2 * half
            message = f"{message[:half]} .. [{left_out:,} characters] .. {message[-half:]}"
        super().__init__(message)


class SpecError(BridgeworkError, ValueError):
    """A recipe, a dotted path or a value is invalid."""


class DataError(BridgeworkError, ValueError):
    """A dataset, a manifest, a shard or a sample is invalid."""


class WeightsError(BridgeworkError, ValueError):
    """Pretrained weights or an artifact do not fit the model."""


class RunError(BridgeworkError, RuntimeError):
    """A run cannot start, continue or resume."""


class Interrupted(RunError):
    """A signal stopped a run, after a checkpoint of its last step."""


class Paused(Interrupted):
    """A run has reached the step after which it was to stop, and saved a checkpoint."""


class TrackingError(BridgeworkError, RuntimeError):
    """The tracker does not answer, or does not know a run, a model, a version or an alias."""


class ResourceError(BridgeworkError, OSError):
    """The machine lacks memory, disk space, a free port or a program."""


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest allowed name, else the list of all names."""
    names = sorted(set(allowed))
    near = get_close_matches(given, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
