"""`bridgework serve APP`: start and stop an app on Serve.

Joins the Ray that RAY_ADDRESS names, else starts one. All apps of one Serve share its port; each
has its own path.
"""

import json
import logging
import os
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
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from bridgework import ray_utils, storage
from bridgework.config import config_class
from bridgework.errors import BridgeworkError, ResourceError, SpecError, suggest
from bridgework.evaluation.gate import read_gate
from bridgework.serving import proxy
from bridgework.serving.app import APPS
from bridgework.serving.auth import is_loopback
from bridgework.serving.models import replica_resources
from bridgework.serving.options import Options, parse_options
from bridgework.serving.registrar import model_apps

ANSWER_S = 30.0  # for the gateway's answer to `traffic`

SMALLER = "ask for less (replicas=, cpus=, gpus=)"


@config_class
class AppAddress:
    """Address of Serve, and the app's name and path there."""

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None  # of the Serve application; default: the app, e.g. "chat"
    route_prefix: str = "/"

    def __post_init__(self) -> None:
        if not self.route_prefix.startswith("/"):
            raise SpecError(
                f"route_prefix: not a path. Got {self.route_prefix!r}; expected e.g. /chat"
            )

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}"


@dataclass(frozen=True)
class Endpoint:
    """A running app."""

    name: str  # of the Serve application
    address: str  # URL
    drain_s: float  # time limit of running requests when the app stops
    own_ray: bool  # Ray was started for this app
    own_serve: bool

    def stop(self, *, drain: bool = True) -> int:
        """Stop the app, and Ray and Serve if they were started for it.

        Other apps of the same Serve continue. With `drain` (the default), new requests are refused
        first and running ones are completed. Returns how many requests were cancelled.
        """
        cancelled = self._drain() if drain else 0
        with suppress(RayServeException):  # Serve did not start
            serve.delete(self.name)
            for name in model_apps(self.name):
                serve.delete(name)
        if self.own_ray or (self.own_serve and not serve.status().applications):
            serve.shutdown()
        if self.own_ray:
            ray.shutdown()
        return cancelled

    def _drain(self) -> int:
        try:
            gateway = serve.get_app_handle(self.name)
            return int(gateway.drain.remote(self.drain_s).result(timeout_s=self.drain_s + 10))
        except (RayError, RayServeException, TimeoutError):  # a dead gateway has no requests
            return 0


def start(app: str, args: Mapping[str, Any], address: AppAddress) -> Endpoint:
    """Start `app` (chat, embed, caption) with `args` (see Options); returns once it answers.

    If Serve already runs on this Ray, the app joins the others there. Raises SpecError for an
    unknown app or argument, for dev=true on a public address, and for a name or path in use;
    ResourceError for a port in use and a Ray that cannot be joined; TrackingError for an unknown
    model.
    """
    options, name = _validate(app, args, address), address.name or app
    if not ray.is_initialized() and ray_utils.address() is None:
        _check_port(address)  # before a new Ray starts
    application, before = APPS[app](dict(args)), replica_resources(options)
    own_ray = not ray.is_initialized() and ray_utils.connect(log_to_driver=True)
    resources = replica_resources(options)
    if resources != before:
        application = APPS[app](dict(args))  # with the nodes that this Ray has or can start
    running = serve.status()
    endpoint = Endpoint(
        name, address.url, options.timeout_s, own_ray, own_serve=not running.proxies
    )
    if name in running.applications:
        raise SpecError(
            f"an app named {name!r} already runs on this Ray. Fix: give another name and path, "
            f"e.g. --name {name}-2 --route-prefix /{name}-2, or stop the other app first"
        )
    (_check_port if endpoint.own_serve else _check_serve)(address)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        if endpoint.own_serve:
            http = {"host": address.host, "port": address.port}
            serve.start(http_options=http, controller_options=proxy.CONTROLLER)
        models = options.replicas * (1 if options.challenger is None else 2)
        ray_utils.wait_for(f"serve {name}", [resources] * models, fix=SMALLER)
        _run(application, name, address.route_prefix)
    except BaseException:
        endpoint.stop(drain=False)
        raise
    return endpoint


def write_config(file: Path, app: str, args: Mapping[str, Any], address: AppAddress) -> None:
    """Write the Serve config of an app, for `serve run FILE` and `serve deploy FILE`.

    `serve build` cannot write it, because it accepts only applications without arguments.
    Raises SpecError as `start` does.
    """
    options = _validate(app, args, address)
    if options.canary.gate is not None:
        read_gate(storage.locate(options.canary.gate))
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": address.host, "port": address.port},
        "controller_options": proxy.CONTROLLER,
        "applications": [
            {
                "name": address.name or app,
                "route_prefix": address.route_prefix,
                "import_path": f"bridgework.serving.app:{app}",
                "args": dict(args),
            }
        ],
    }
    try:
        ServeDeploySchema.model_validate(config)
    except ValueError as error:
        raise SpecError(
            f"Serve rejects the config: {str(error).splitlines()[-1].strip()}"
        ) from None
    file.write_text(json.dumps(config, indent=2) + "\n")  # JSON is YAML


def wait(endpoint: Endpoint) -> int:
    """Serve until SIGTERM or Ctrl-C, then complete the running requests.

    A second signal stops the app at once. Returns how many requests were cancelled.
    """
    stopping, now = Event(), Event()

    def stop(number: int, frame: FrameType | None) -> None:
        (now if stopping.is_set() else stopping).set()
        if now.is_set():
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # ignored by a background job of a shell
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


def traffic(name: str, share: float | None) -> dict[str, Any]:
    """Return the models of the running app `name` with their shares (see Rollout.state).

    share: of the challenger, set before if it is given. Raises SpecError for an unknown app and a
    share out of range, ResourceError if no Ray is running.
    """
    if not ray.is_initialized():
        named = ray_utils.address()
        if named is None:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # as `bridgework serve` starts it
        try:
            ray_utils.join(named or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except ResourceError as error:
            if named is not None or not isinstance(error.__cause__, ConnectionError):
                raise
            raise ResourceError(
                "no Ray is running on this machine. Fix: start the app with `bridgework serve`, "
                "or set RAY_ADDRESS"
            ) from None
    apps = serve.status().applications
    if name not in apps:
        raise SpecError(
            f"traffic: no app of this name is running. Got {name!r}{suggest(name, apps)}"
        )
    try:
        found = serve.get_app_handle(name).traffic.remote(share).result(timeout_s=ANSWER_S)
    except RayTaskError as error:
        if isinstance(error.cause, BridgeworkError):
            raise error.cause from None
        raise
    return dict(found)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of this machine that is not in use."""
    return _bind(host, 0)


def _validate(app: str, args: Mapping[str, Any], address: AppAddress) -> Options:
    if app not in APPS:
        raise SpecError(f"serve: unknown app. Got {app!r}{suggest(app, APPS)}")
    options = parse_options(args)
    if options.dev and not is_loopback(address.host):
        raise SpecError(
            f"host: dev=true needs no key, so it is allowed on loopback only. Got {address.host}; "
            "expected e.g. 127.0.0.1. Fix: leave out dev=true and set a key"
        )
    return options


def _run(application: serve.Application, name: str, route_prefix: str) -> None:
    try:
        serve.run(application, name=name, route_prefix=route_prefix)
    except RayServeException as error:
        if "Prefix" in str(error):
            raise SpecError(
                f"the path {route_prefix} is taken by another app of this Ray. "
                f"Fix: give another one, e.g. --route-prefix /{name}"
            ) from None
        raise


def _check_port(address: AppAddress) -> None:
    try:
        _bind(address.host, address.port)
    except OSError as error:
        message = f"port {address.port} of {address.host} cannot be used ({error.strerror})"
        raise ResourceError(f"{message}. Fix: port {free_port(address.host)} is free") from None


def _check_serve(address: AppAddress) -> None:
    try:
        socket.create_connection((address.host, address.port), timeout=5).close()
    except OSError:
        message = f"this Ray already serves, and not on port {address.port} of {address.host}"
        raise ResourceError(f"{message}. Fix: give --host and --port of its Serve") from None


def _bind(host: str, port: int) -> int:
    with socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    ) as listener:
        return int(listener.getsockname()[1])
