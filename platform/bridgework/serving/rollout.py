"""Rollout: the background work of a gateway on its models.

It compares the challenger with the champion after every request, asks both the probes, rolls back
or promotes the challenger, and serves the version to which an alias moved.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from bridgework import storage
from bridgework.errors import BridgeworkError, SpecError
from bridgework.serving.canary import Canary, Verdict
from bridgework.serving.errors import APIError
from bridgework.serving.metrics import GatewayMetrics
from bridgework.serving.options import Options
from bridgework.serving.probes import Probe
from bridgework.serving.registrar import Registrar, model_app, model_apps
from bridgework.serving.router import Outcome, Route, Router, ServedModel

CHECK_S = 2.0  # between two looks at whether the challenger may be promoted
RETRY_S = 60.0  # after a model could not be loaded, or a decision not be recorded
GRACE_S = 10.0  # a replaced model stays as long for requests that are being read

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedShare:
    """A share that was set while the app ran. It holds until the app starts with another one."""

    champion: str  # ids of the deployments
    challenger: str
    option: float  # `share` of the app's arguments
    share: float
    rolled_back: str = ""  # the reason


@dataclass(frozen=True)
class _Decision:
    """A decision that waits to be recorded."""

    name: str
    models: tuple[ServedModel, ServedModel]
    reason: str
    figures: dict[str, float]
    share: float


class Rollout:
    """The models of one gateway over time."""

    def __init__(
        self, app: str, name: str, options: Options, router: Router, metrics: GatewayMetrics
    ) -> None:
        self._app, self._name, self._options = app, name, options
        self._router, self._metrics = router, metrics
        self._actor: Any = None
        self._probes: list[Probe] = []
        self._decisions: list[_Decision] = []
        self._failed: dict[str, float] = {}  # id of a model -> time of its failure to load
        self._retiring: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()
        router.observe = self._observe
        self._begin()

    # --- the comparison

    def _begin(self) -> None:
        """Begin to compare the models that the router has now."""
        self._canary = Canary(self._options.canary)
        self._since = time.monotonic()
        self._rolled_back = ""
        self._settled = False  # the gate refused the promotion
        self._router.share = self._options.share
        saved = _read(self._file)
        if saved is not None and saved == self._saved(saved.share, saved.rolled_back):
            self._router.share, self._rolled_back = saved.share, saved.rolled_back
            log.warning(
                "the challenger's share is %g, as it was set while the app ran%s. "
                "Fix: bridgework traffic %s --share %g",
                saved.share,
                f" ({saved.rolled_back})" if saved.rolled_back else "",
                self._name,
                self._options.share,
            )
        self._metrics.rolled_back.set(bool(self._rolled_back))

    def _observe(self, outcome: Outcome) -> None:
        """Count a call of a model, and decide."""
        served, group = outcome.route.served, outcome.route.group
        roles = {model.id: role for role, model in self._router.roles.items()}
        self._metrics.observe(outcome, roles.get(served.id, "replaced"))
        if group is None or served.id not in roles or not self._router.share:
            return
        self._canary.observe(group, outcome.seconds, error=outcome.result == "error")
        self._judge()

    def _judge(self) -> None:
        """Roll the challenger back if it is worse."""
        verdict = self._canary.verdict()
        if verdict is None:
            return
        share, self._router.share = self._router.share, 0.0
        self._rolled_back = verdict.reason
        self._metrics.rolled_back.set(1)
        self._decided("roll_back", verdict, share)
        self._save()

    def _decided(self, decision: str, verdict: Verdict, share: float) -> None:
        champion, challenger = self._pair()
        log.warning("%s of challenger %s: %s", decision, challenger.pinned, verdict.reason)
        self._metrics.decided(decision, challenger.model, challenger.version)
        self._decisions.append(
            _Decision(
                decision, (champion, challenger), verdict.reason, dict(verdict.figures), share
            )
        )

    def _pair(self) -> tuple[ServedModel, ServedModel]:
        """Return (champion, challenger). Raises SpecError without a challenger."""
        if self._router.challenger is None:
            raise SpecError(
                f"traffic: {self._name} has no challenger. "
                "Fix: start it with challenger=NAME@challenger"
            )
        return self._router.champion, self._router.challenger

    # --- shares set at run time

    def set_share(self, share: float) -> None:
        """Set the challenger's share and begin a new comparison. Raises SpecError."""
        self._pair()
        if not 0.0 <= share <= 1.0:
            raise SpecError(f"share: out of range. Got {share:g}; expected 0 to 1")
        self._canary = Canary(self._options.canary)
        self._since = time.monotonic()
        self._rolled_back, self._settled = "", False
        self._metrics.rolled_back.set(0)
        self._router.share = share
        self._save()

    def state(self) -> dict[str, Any]:
        """Return the models with their shares, and the figures of the comparison."""
        roles = self._router.roles
        share = self._router.share if "challenger" in roles else 0.0
        models = [
            {
                "role": role,
                "model": served.pinned,
                "deployment": served.id,
                "share": share if role == "challenger" else 1 - share,
                "running": self._router.running(served),
            }
            for role, served in roles.items()
        ]
        figures = self._canary.figures()
        return {"models": models, "figures": figures, "rolled_back": self._rolled_back}

    @property
    def _file(self) -> Path:
        return storage.locate(str(self._options.home)) / "traffic" / f"{self._name}.json"

    def _saved(self, share: float, rolled_back: str) -> SavedShare | None:
        if self._router.challenger is None:
            return None
        champion, challenger = self._pair()
        return SavedShare(champion.id, challenger.id, self._options.share, share, rolled_back)

    def _save(self) -> None:
        """Write the share, so that a gateway that starts again has it."""
        saved = self._saved(self._router.share, self._rolled_back)
        assert saved is not None  # there is a challenger
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            storage.write_atomic(self._file, json.dumps(asdict(saved), indent=1))
        except OSError as error:
            log.warning("the share is not saved, so a new gateway will not have it: %s", error)

    # --- background work

    async def start(self) -> None:
        """Load the models that follow an alias."""
        if self._options.follow:
            await self._sync()
            if not self._router.roles:
                raise RuntimeError("the champion could not be loaded; see the log")

    async def run(self) -> None:
        """Follow, probe, promote and record until cancelled."""
        if not self._options.follow and self._router.challenger is None:
            return
        loops = [self._repeat(self._record, 1.0)]
        if self._options.follow:
            loops.append(self._repeat(self._sync, self._options.poll_s, self._moved))
        if self._options.challenger is not None:
            loops.append(self._repeat(self._promote, CHECK_S))
            if self._options.canary.probes is None:
                log.warning(
                    "no probes: the answers of the two models are not compared. "
                    "Fix: canary.probes=DATASET"
                )
            else:
                loops.append(self._repeat(self._probe, self._options.canary.probe_s))
        await asyncio.gather(*loops)

    def look(self) -> bool:
        """Ask the registry for the aliases now. Returns False if the app follows none."""
        self._moved.set()
        return self._options.follow is not None

    async def stop(self) -> None:
        """Delete the models of an app that is being deleted."""
        if not self._options.follow:
            return
        found = (await asyncio.to_thread(serve.status)).applications.get(self._name)
        if found is None or found.status == ApplicationStatus.DELETING:
            for name in await asyncio.to_thread(model_apps, self._name):
                await asyncio.to_thread(serve.delete, name, _blocking=False)

    async def ask(self, method: str, *args: Any) -> Any:
        """Return the result of a method of the Registrar. Raises BridgeworkError."""
        if self._actor is None:
            actor = ray.remote(Registrar).options(num_cpus=0, max_concurrency=4, max_restarts=-1)
            self._actor = actor.remote(self._app, self._name, self._options)
        try:
            return await getattr(self._actor, method).remote(*args)
        except RayTaskError as error:
            if isinstance(error.cause, BridgeworkError):
                raise error.cause from None
            raise
        except RayActorError:
            self._actor = None  # its start failed, e.g. because MLflow does not answer
            raise

    async def _repeat(
        self,
        work: Callable[[], Awaitable[None]],
        interval_s: float,
        now: asyncio.Event | None = None,
    ) -> None:
        """Do the work every `interval_s` seconds, and when `now` is set."""
        now = now or asyncio.Event()
        while True:
            now.clear()
            pause_s = interval_s
            try:
                await work()
            except (BridgeworkError, RayError, RayServeException) as error:
                log.warning("%s. It is tried again", str(error).strip().splitlines()[-1])
                pause_s += min(RETRY_S, 5 * interval_s)
            except Exception:  # the other loops must continue
                log.exception("background work of %s failed. It is tried again", self._name)
                pause_s += RETRY_S
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await now.wait()

    async def _record(self) -> None:
        while self._decisions:
            one = self._decisions[0]
            await self.ask("record", one.name, one.models, one.reason, one.figures, one.share)
            del self._decisions[0]

    async def _probe(self) -> None:
        """Ask both models the probes."""
        if not self._router.share or self._router.challenger is None:
            return
        if not self._probes:
            self._probes = await self.ask("probes")
        pair = self._pair()
        scores = [
            [await self._score(served, probe) for probe in self._probes]  # in turn: not urgent
            for served in pair
        ]
        if self._router.share and pair == self._pair():
            self._canary.observe_probes(*scores)
            for role, served, own in zip(self._router.roles, pair, scores, strict=True):
                labels = (served.model, served.version, role)
                self._metrics.probe_score.labels(*labels).set(sum(own) / len(own))
            self._judge()

    async def _score(self, served: ServedModel, probe: Probe) -> float:
        try:
            given = await self._router.call(Route(served), probe.method, *probe.arguments)
        except APIError:
            return 0.0
        return probe.score(given)

    async def _promote(self) -> None:
        """Promote a challenger that was good for long enough."""
        if not self._options.auto_promote or not self._router.share or self._settled:
            return
        if self._router.challenger is None:
            return
        verdict = self._canary.promotable(time.monotonic() - self._since)
        if verdict is None:
            return
        champion, challenger = self._pair()
        share, self._settled = self._router.share, True
        try:
            await self.ask("promote", challenger)
        except BridgeworkError as error:
            self._decided("not_promoted", Verdict(False, str(error), verdict.figures), share)
            return
        self._decided("promote", verdict, share)
        if not self._options.follow:  # else the moved alias is noticed
            handles = [(m, self._router.handle(m)) for m in (challenger, champion)]
            self._router.switch(handles)
            self._router.share = 0.0

    # --- models that follow an alias

    async def _sync(self) -> None:
        """Serve the versions that the aliases name now: load them, switch, unload the others."""
        wanted: list[ServedModel] = await self.ask("resolve")
        current = list(self._router.roles.values())
        if [m.id for m in wanted] == [m.id for m in current]:
            return
        handles = []
        for served in wanted:
            handle = await self._loaded(served)
            if handle is not None:
                handles.append((served, handle))
            elif not handles:  # without the new champion, the models stay as they are
                return
        if [m.id for m, _ in handles] == [m.id for m in current]:
            return
        self._router.switch(handles)
        self._begin()
        if current:
            self._metrics.switches.labels("ok").inc()
        log.warning("serving %s", " and ".join(served.pinned for served, _ in handles))
        for served in current:
            if served.id not in {m.id for m, _ in handles}:
                task = asyncio.create_task(self._retire(served))
                self._retiring.add(task)
                task.add_done_callback(self._retiring.discard)

    async def _loaded(self, served: ServedModel) -> DeploymentHandle[Any] | None:
        """Return the handle of a model, which is loaded if need be; None if that failed."""
        if self._router.has(served):
            return self._router.handle(served)
        if time.monotonic() - self._failed.get(served.id, -RETRY_S) < RETRY_S:
            return None
        log.warning("loading %s", served.pinned)
        try:
            await self.ask("deploy", served)
        except (BridgeworkError, RayError) as error:
            self._failed[served.id] = time.monotonic()
            self._metrics.switches.labels("failed").inc()
            log.error("%s", str(error).strip().splitlines()[-1])
            return None
        return await asyncio.to_thread(serve.get_app_handle, model_app(self._name, served))

    async def _retire(self, served: ServedModel) -> None:
        """Unload a model after its last request, unless an alias names it again."""
        await asyncio.sleep(GRACE_S)
        while self._router.running(served):
            await asyncio.sleep(0.5)
        if served.id not in {m.id for m in self._router.roles.values()}:
            self._router.forget(served)
            await self.ask("delete", served)


def _read(file: Path) -> SavedShare | None:
    """Return the saved share; None if there is none that can be read."""
    try:
        return SavedShare(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is not a saved share and is ignored: %s", file, error)
        return None
