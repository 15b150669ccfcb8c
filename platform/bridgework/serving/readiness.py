"""Readiness of an app: the models without a running replica, as Serve's controller reports."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import cast

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

CACHE_S = 1.0  # health checks need no key, so they must not load the controller
TIMEOUT_S = 5.0


class Readiness:
    """Queries the state of some deployments of an app, at most once per CACHE_S seconds."""

    def __init__(self, app: str, deployments: Sequence[str]) -> None:
        self._app, self._deployments = app, list(deployments)
        self._query: asyncio.Future[list[str]] | None = None
        self._queried = 0.0

    async def missing(self) -> list[str]:
        """Return the deployments without a running replica; all if there is no answer."""
        now = time.monotonic()
        if self._query is None or (self._query.done() and now - self._queried > CACHE_S):
            self._query, self._queried = (
                asyncio.ensure_future(asyncio.to_thread(self._missing)),
                now,
            )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await asyncio.shield(self._query)
        except TimeoutError:
            return self._deployments

    def _missing(self) -> list[str]:
        try:
            states = serve.status().applications[self._app].deployments
        except (KeyError, RayError, RayServeException):
            return self._deployments
        counts = {
            name: cast(Mapping[str, int], state.replica_states) for name, state in states.items()
        }
        return [name for name in self._deployments if not counts.get(name, {}).get("RUNNING")]
