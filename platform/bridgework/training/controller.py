"""What runs in the controller of Ray Train: where the next workers begin, and which errors end a stage.

It is a process of its own at every stage, so nothing here brings torch, which takes seconds to import.
"""

from pathlib import Path
from typing import Any

from ray.train import UserCallback

from bridgework.errors import BridgeworkError, ResourceError
from bridgework.training import checkpoint


def cursor(folder: Path, fingerprint: str) -> int:
    """The step from which the next worker group goes on: our manifest's, not what Ray remembers."""
    found, _ = checkpoint.newest(folder, fingerprint)
    return found.step if found else 0


class OursEndTheStage(UserCallback):
    """An error of ours says what a person must do, and another start would not do it; the machine's own may pass."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """What is raised here is not tried again."""
        for error in worker_exceptions.values():
            found = cause(error)
            if isinstance(found, BridgeworkError) and not isinstance(found, ResourceError):
                raise found


def cause(error: BaseException) -> BaseException:
    """The first of our own errors in a chain of Ray's, else the innermost."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        at = todo.pop(0)
        if at is None or at in seen:
            continue
        if isinstance(at, BridgeworkError):
            return at
        seen.append(at)
        todo += [at.__cause__, at.__context__, getattr(at, "cause", None), getattr(at, "controller_failure", None)]
        todo += list(getattr(at, "worker_failures", {}).values())
    return seen[-1]
