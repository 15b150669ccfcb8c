"""Arguments of an app, e.g.

`serve run serve_apps.chat:app model=llava replicas=2 limits.images=4`.
"""

import re
from collections.abc import Mapping
from math import inf
from typing import Any, Literal

from bridgework.config import config_class, override
from bridgework.errors import SpecError
from bridgework.inference.status import EngineLimits
from bridgework.serving.protocol import MAX_LIST

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s*]+")


@config_class
class RequestLimits:
    """Limits of one request."""

    body_bytes: int = 32 * 2**20
    body_s: float = 30.0  # from the first byte of a body to its last
    text_chars: int = 65_536  # of all texts of the request
    stop_chars: int = 1_024  # of its stop strings, which are searched for at every token
    schema_chars: int = 16_384  # of a JSON schema
    messages: int = 256
    items: int = 128  # inputs to embed, labels, candidates
    images: int = 16  # in one conversation, or to caption
    image_bytes: int = 8 * 2**20  # each, decoded from base64
    header_chars: int = 64  # of a data: URL, before the comma
    side: int = 16_384  # pixels
    pixels: int = 40_000_000  # of one image; an 8k frame has 33 million
    total_pixels: int = 100_000_000  # of all images; decoding them takes about 1.5 s of a core
    frames: int = 1  # of an image file
    video_frames: int = 64  # of a video_url
    answers: int = 8  # `n` of a request

    def __post_init__(self) -> None:
        if self.body_s <= 0:
            raise SpecError(f"limits.body_s must be above 0, got {self.body_s:g}")
        low = [name for name, value in vars(self).items() if name != "body_s" and value < 1]
        if low:
            raise SpecError(f"limits.{low[0]} must be at least 1, got {getattr(self, low[0])}")
        high = [name for name in ("messages", "items", "images") if getattr(self, name) > MAX_LIST]
        if high:
            raise SpecError(
                f"limits.{high[0]} must be at most {MAX_LIST}, got {getattr(self, high[0])}"
            )


@config_class
class CanaryLimits:
    """Margins by which a challenger may be worse before its share becomes 0, and promotion."""

    errors: float = 0.02  # difference of the error rates
    latency: float = 1.2  # ratio of the latencies
    answers: float = 0.05  # difference of the mean scores of the probes
    alpha: float = 0.05  # probability that a challenger within the margins is rolled back; 0: off
    first: int = 20  # requests of the challenger before the first test
    probes: str | None = None  # dataset of questions with answers that both models are asked
    probe_rows: int = 32
    probe_s: float = 60.0  # interval
    promote_requests: int = 1_000  # of each model, before --auto-promote
    promote_s: float = 3_600.0  # duration of the comparison before --auto-promote
    metric: str | None = None  # as `--metric` of `bridgework promote`: the only one to improve
    gate: str | None = None  # file of the promotion's gate, as `--gate` of `bridgework promote`

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "errors": (0, 1), "latency": (1, inf), "answers": (0, 1), "alpha": (0, 0.5),
            "first": (1, inf), "probe_rows": (1, 1_000), "probe_s": (1, inf),
            "promote_requests": (1, inf), "promote_s": (0, inf),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                expected = f"at least {low:g}" if high == inf else f"{low:g} to {high:g}"
                raise SpecError(f"canary.{name}: out of range. Got {value:g}; expected {expected}")
        if self.metric is not None and self.gate is not None:
            raise SpecError(
                "canary.gate and canary.metric exclude each other. Fix: put the metric into the gate"
            )


@config_class
class Options:
    """Arguments of one app: models, callers, resources."""

    model: str  # NAME (its champion), NAME@alias, NAME:version, or the folder of an artifact
    challenger: str | None = None  # another one in the same notation, loaded next to the model
    share: float = 0.0  # share of the requests that the challenger answers
    follow: Literal["alias"] | None = None  # serve the version to which an alias moves
    poll_s: float = 2.0  # between two looks at a followed alias; a webhook starts one at once
    auto_promote: bool = False  # promote a challenger that was good for long enough
    load_s: float = 900.0  # time to load a model to which an alias moved
    canary: CanaryLimits = CanaryLimits()
    home: str | None = None  # deployments are recorded here; $BRIDGEWORK_HOME or ./.bridgework
    tracking: str | None = None  # URI of the MLflow server; default: the store under home
    keys: str | None = None  # file of key digests; default: $BRIDGEWORK_API_KEYS
    dev: bool = False  # no key, and this machine only
    cors: tuple[
        str, ...
    ] = ()  # origins of web pages that may call, e.g. https://app.example; * all
    device: str | None = None  # of the model, as torch names it; default: a GPU if there is one
    int8: bool = False  # the language model's weights in 8 bits: less memory, not faster
    cpus: float = 1.0  # per replica of the model
    # per replica of the model; default: 1 if the cluster has GPUs or can start nodes with GPUs
    gpus: float | None = None
    replicas: int = 1
    max_replicas: int | None = None  # if given, Serve scales between `replicas` and this
    ongoing: int = 32  # requests that one replica holds at once
    engine: EngineLimits = EngineLimits()
    queued: int = 64  # requests that may wait for a replica; the next one is answered 429
    per_key: int | None = (
        None  # slots that one key may hold; default: 3/4 if there are several keys
    )
    votes_bytes: int = 2**30  # of the votes of the playground, with their images
    held_bytes: int = 2**30  # of the bodies that a gateway holds at once
    # streamed pieces of text that a replica sends; faster ones are joined
    pieces_per_s: float = 100.0
    batch: int = 16  # largest batch of embeddings
    batch_wait_s: float = 0.01
    max_new_tokens: int = 512  # of a request that sets no max_tokens
    timeout_s: float = 120.0  # for a complete answer; for a stream, for each piece
    limits: RequestLimits = RequestLimits()

    def __post_init__(self) -> None:
        for field in ("replicas", "ongoing", "queued", "per_key", "batch", "max_new_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise SpecError(f"{field} must be at least 1, got {value}")
        if not 0.0 <= self.share <= 1.0:
            raise SpecError(f"share must be in [0, 1], got {self.share:g}")
        for field in ("timeout_s", "load_s", "poll_s", "pieces_per_s"):
            if not getattr(self, field) > 0:
                raise SpecError(f"{field} must be above 0, got {getattr(self, field):g}")
        for origin in self.cors:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise SpecError(
                    f"cors: not an origin. Got {origin!r}; expected SCHEME://HOST[:PORT], or *"
                )

    @property
    def models(self) -> list[str]:
        """The names of the champion and, if there is one, of the challenger."""
        return [self.model] if self.challenger is None else [self.model, self.challenger]

    @property
    def slots(self) -> int:
        """Number of requests that one gateway holds at once, including the waiting ones."""
        return self.ongoing * (self.max_replicas or self.replicas) + self.queued

    def slots_per_key(self, keys: int) -> int:
        """Return the number of slots that one of `keys` keys may hold."""
        shared = self.slots if keys < 2 else max(1, self.slots * 3 // 4)
        return min(self.slots, self.per_key or shared)


def follows(model: str) -> bool:
    """Return True for a model that is named by an alias: NAME or NAME@alias."""
    return "/" not in model and ":" not in model


def parse_options(args: Mapping[str, Any]) -> Options:
    """Parse the arguments of `serve run`, or the `args` of a Serve config. Raises SpecError."""
    options = override(
        Options(model=str(args.get("model") or "")), {k: v for k, v in args.items() if k != "model"}
    )
    if not options.model:
        raise SpecError(
            "model= is missing. Expected NAME, NAME@alias, NAME:version or an artifact's folder"
        )
    _check_combinations(options)
    return options


def _check_combinations(options: Options) -> None:
    """Raise SpecError for fields that contradict each other."""
    if options.max_replicas is not None and options.max_replicas < options.replicas:
        raise SpecError(f"max_replicas {options.max_replicas} is below replicas {options.replicas}")
    if options.share and options.challenger is None:
        raise SpecError(
            f"share={options.share:g} without a challenger. Fix: give challenger=NAME@challenger"
        )
    if options.auto_promote and options.challenger is None:
        raise SpecError("auto_promote without a challenger. Fix: give challenger=NAME@challenger")
    for field in ("gate", "metric"):
        if getattr(options.canary, field) is not None and not options.auto_promote:
            raise SpecError(
                f"canary.{field} without auto_promote, so nothing is promoted. "
                "Fix: give auto_promote=true (--auto-promote), or leave it out"
            )
    if options.auto_promote and len({re.split("[@:]", name)[0] for name in options.models}) > 1:
        raise SpecError(
            "auto_promote: the models are not versions of one registered model. "
            f"Got {', '.join(options.models)}; expected e.g. NAME, NAME@challenger"
        )
    if options.auto_promote and any("/" in name for name in options.models):
        raise SpecError(
            "auto_promote: a folder has no alias. "
            f"Got {', '.join(options.models)}; expected e.g. NAME, NAME@challenger"
        )
    if options.follow and not any(map(follows, options.models)):
        raise SpecError(
            f"follow={options.follow}: no model has an alias. Got {', '.join(options.models)}; "
            "expected NAME (its champion) or NAME@alias"
        )
    if options.dev and "*" in options.cors:
        raise SpecError(
            "cors=* with dev=true lets any web page use this server without a key. "
            "Fix: name the origins"
        )
    if options.limits.body_bytes > options.held_bytes:
        raise SpecError(
            f"held_bytes {options.held_bytes} is below limits.body_bytes "
            f"{options.limits.body_bytes}"
        )
