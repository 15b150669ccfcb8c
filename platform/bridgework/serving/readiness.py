"""Readiness of an app: the models without a running replica, as Serve's controller reports."""

import asyncio
import time
from collections.abc import Mapping
from typing import cast

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from bridgework.serving.router import Router

CACHE_S = 1.0  # health checks need no key, so they must not load the controller
TIMEOUT_S = 5.0


class Readiness:
    """Queries the state of the models of a router, at most once per CACHE_S seconds."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._query: asyncio.Future[list[str]] | None = None
        self._queried = 0.0

    async def missing(self) -> list[str]:
        """Return the roles without a running replica; all if there is no answer."""
        now = time.monotonic()
        if self._query is None or (self._query.done() and now - self._queried > CACHE_S):
            deployments = {}
            for role, served in self._router.roles.items():
                handle = self._router.handle(served)
                deployments[role] = (handle.app_name, handle.deployment_name)
            self._query, self._queried = (
                asyncio.ensure_future(asyncio.to_thread(_missing, deployments)),
                now,
            )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await asyncio.shield(self._query)
        except TimeoutError:
            return list(self._router.roles)


def _missing(deployments: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return the roles whose deployment (app, name) has no running replica."""
    try:
        applications = serve.status().applications
    except (RayError, RayServeException):
        return list(deployments)

    def running(app: str, deployment: str) -> int:
        found = applications[app].deployments.get(deployment) if app in applications else None
        states = {} if found is None else cast(Mapping[str, int], found.replica_states)
        return states.get("RUNNING", 0)

    return [role for role, where in deployments.items() if not running(*where)]
