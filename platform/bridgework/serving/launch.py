"""`bridgework serve APP`: a Ray of its own or the one that RAY_ADDRESS names, Serve on one port, the app at a path."""

import json
import logging
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from bridgework import ray_utils
from bridgework.config import config_class
from bridgework.errors import ResourceError, SpecError, suggest
from bridgework.serving import options as options_of
from bridgework.serving import proxy
from bridgework.serving.app import APPS
from bridgework.serving.auth import is_loopback
from bridgework.serving.options import Options


@config_class
class Where:
    """The place of an app: the address of Serve, and the app's name and path there."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None  # default: the app's own
    route_prefix: str = "/"

    def __post_init__(self) -> None:
        if not self.route_prefix.startswith("/"):
            raise SpecError(
                f"route_prefix: not a path. Got {self.route_prefix!r}; expected it to begin with /"
            )

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}"


@dataclass(frozen=True)
class Endpoint:
    """A running app, and what was started for it."""

    name: str  # of the Serve application
    address: str
    drain_s: float  # seconds that running requests may take once it stops
    own_ray: bool
    own_serve: bool

    def stop(self, *, drain: bool = True) -> int:
        """End the app, and of Ray and Serve what was started for it; other apps of the same Serve go on.

        With `drain`, new requests are refused first and running ones are finished. Returns how many were cut off.
        """
        left = self._drain() if drain else 0
        with suppress(RayServeException):  # Serve did not even start
            serve.delete(self.name)
        if self.own_ray or (self.own_serve and not serve.status().applications):
            serve.shutdown()
        if self.own_ray:
            ray.shutdown()
        return left

    def _drain(self) -> int:
        try:
            gateway = serve.get_app_handle(self.name)
            return int(gateway.drain.remote(self.drain_s).result(timeout_s=self.drain_s + 10))
        except (
            RayError,
            RayServeException,
            TimeoutError,
        ):  # a gateway that is dead has nothing to finish
            return 0


def start(app: str, args: Mapping[str, Any], where: Where) -> Endpoint:
    """Serve `app` (chat, embed, caption) with `args` (see Options); returns once it answers.

    On a Ray that already serves, the app joins the others there.
    Raises SpecError for an unknown app or argument, for dev=true on an address that others reach, and for a name or a
    path that is taken; ResourceError for a port in use and a Ray that cannot be joined; TrackingError for an unknown
    model.
    """
    options, name = _checked(app, args, where), where.name or app
    if not ray.is_initialized() and ray_utils.address() is None:
        _check_port(where)  # what is wrong is found before a Ray of its own starts
    application = APPS[app](dict(args))
    own_ray = not ray.is_initialized() and ray_utils.connect(log_to_driver=True)
    running = serve.status()
    endpoint = Endpoint(name, where.url, options.timeout_s, own_ray, own_serve=not running.proxies)
    if name in running.applications:
        raise SpecError(
            f"an app named {name!r} already runs on this Ray. Fix: give another name and path, e.g. "
            f"--name {name}-2 --route-prefix /{name}-2, or end the other one first"
        )
    (_check_port if endpoint.own_serve else _check_listens)(where)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        if endpoint.own_serve:
            http = {"host": where.host, "port": where.port}
            serve.start(http_options=http, controller_options=proxy.CONTROLLER)
        _run(application, name, where.route_prefix)
    except BaseException:
        endpoint.stop(drain=False)
        raise
    return endpoint


def write(file: Path, app: str, args: Mapping[str, Any], where: Where) -> None:
    """Write the Serve config of an app, for `serve run FILE` and `serve deploy FILE`.

    `serve build` cannot: it takes no application that has arguments. Raises SpecError as `start` does.
    """
    _checked(app, args, where)
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": where.host, "port": where.port},
        "controller_options": proxy.CONTROLLER,
        "applications": [
            {
                "name": where.name or app,
                "route_prefix": where.route_prefix,
                "import_path": f"bridgework.serving.app:{app}",
                "args": dict(args),
            }
        ],
    }
    try:
        ServeDeploySchema.model_validate(config)
    except ValueError as error:
        raise SpecError(
            f"Serve refuses the config: {str(error).splitlines()[-1].strip()}"
        ) from None
    file.write_text(json.dumps(config, indent=2) + "\n")  # JSON is YAML


def wait(endpoint: Endpoint) -> int:
    """Serve until SIGTERM or Ctrl-C, then finish what runs and end the app; a second signal ends it at once.

    Returns how many requests were cut off.
    """
    stopping, now = Event(), Event()

    def stop(number: int, frame: FrameType | None) -> None:
        (now if stopping.is_set() else stopping).set()
        if now.is_set():
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # of a job in the background of a shell
            signal.signal(number, stop)
    try:
        while not stopping.wait(3600):
            pass
        return endpoint.stop()
    except KeyboardInterrupt:
        return endpoint.stop(drain=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that is not in use."""
    return _bind(host, 0)


def _checked(app: str, args: Mapping[str, Any], where: Where) -> Options:
    if app not in APPS:
        raise SpecError(f"there is no app {app!r}" + suggest(app, APPS))
    options = options_of.read(args)
    if options.dev and not is_loopback(where.host):
        raise SpecError(
            f"dev=true needs no key, so it is for loopback only; {where.host} is reached by others"
        )
    return options


def _run(application: serve.Application, name: str, route_prefix: str) -> None:
    try:
        serve.run(application, name=name, route_prefix=route_prefix)
    except RayServeException as error:
        if "Prefix" in str(error):
            raise SpecError(
                f"the path {route_prefix} is taken by another app of this Ray. Fix: give another one, "
                f"e.g. --route-prefix /{name}"
            ) from None
        raise


def _check_port(where: Where) -> None:
    try:
        _bind(where.host, where.port)
    except OSError as error:
        message = f"port {where.port} of {where.host} cannot be used ({error.strerror})"
        raise ResourceError(f"{message}; port {free_port(where.host)} is free") from None


def _check_listens(where: Where) -> None:
    try:
        socket.create_connection((where.host, where.port), timeout=5).close()
    except OSError:
        message = f"this Ray already serves, and not on port {where.port} of {where.host}"
        raise ResourceError(f"{message}. Fix: give the host and port of its Serve") from None


def _bind(host: str, port: int) -> int:
    with socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    ) as listener:
        return int(listener.getsockname()[1])
