"""Readiness of an app: whether each of its models has a running replica, as Serve's controller reports."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import cast

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

KEEP_S = (
    1.0  # an answer is kept this long: health checks need no key, and must not load the controller
)
WAIT_S = 5.0


class Readiness:
    """Asks for the state of some deployments of an app."""

    def __init__(self, app: str, deployments: Sequence[str]) -> None:
        self._app, self._deployments = app, list(deployments)
        self._asking: asyncio.Future[list[str]] | None = None
        self._asked = 0.0

    async def missing(self) -> list[str]:
        """The deployments without a running replica; all of them where the controller does not answer."""
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now - self._asked > KEEP_S):
            self._asking, self._asked = asyncio.ensure_future(asyncio.to_thread(self._ask)), now
        try:
            async with asyncio.timeout(WAIT_S):
                return await asyncio.shield(self._asking)
        except TimeoutError:
            return self._deployments

    def _ask(self) -> list[str]:
        try:
            states = serve.status().applications[self._app].deployments
        except (KeyError, RayError, RayServeException):
            return self._deployments
        counts = {
            name: cast(Mapping[str, int], state.replica_states) for name, state in states.items()
        }
        return [name for name in self._deployments if not counts.get(name, {}).get("RUNNING")]
