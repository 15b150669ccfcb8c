"""`bridgework serve APP`: a Ray of its own (or the one that RAY_ADDRESS names), Serve on one port, the app at /."""

import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray import serve

from bridgework.errors import ResourceError, SpecError, suggest
from bridgework.serving import options
from bridgework.serving.apps import APPS
from bridgework.serving.guard import is_loopback


def start(app: str, args: Mapping[str, Any], *, host: str = "127.0.0.1", port: int = 8000) -> str:
    """Serve `app` (chat, embed, caption) with `args` (see Options) and return its address, once it answers.

    Raises SpecError for an unknown app or argument, for
    dev=true on an address that others reach, ResourceError for a port in use, TrackingError for an unknown model.
    """
    if app not in APPS:
        raise SpecError(f"there is no app {app!r}" + suggest(app, APPS))
    if options.read(args).dev and not is_loopback(host):
        raise SpecError(f"dev=true needs no key, so it is for loopback only; {host} is reached by others")
    _check_port(host, port)
    application = APPS[app](dict(args))
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port})
    serve.run(application, name=app, route_prefix="/")
    _check_listens(host, port)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def wait() -> None:
    """Return after Ctrl-C, with Serve stopped."""
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
    serve.shutdown()


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens on."""
    return _bind(host, 0)


def _check_port(host: str, port: int) -> None:
    try:
        _bind(host, port)
    except OSError as error:
        free = free_port(host)
        raise ResourceError(f"port {port} of {host} cannot be used ({error.strerror}); port {free} is free") from None


def _check_listens(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        raise ResourceError(
            f"Serve runs, but not on port {port} of {host}: the Ray at RAY_ADDRESS already serves on another port; "
            "use that one, or `serve shutdown` there first"
        ) from None


def _bind(host: str, port: int) -> int:
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        return int(listener.getsockname()[1])
