"""Arguments of an app, e.g.

`serve run serve_apps.chat:app model=llava replicas=2 limits.images=4`.
"""

import re
from collections.abc import Mapping
from typing import Any

from bridgework.config import config_class, override
from bridgework.errors import SpecError
from bridgework.serving.protocol import MAX_LIST

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s*]+")


@config_class
class RequestLimits:
    """Limits of one request."""

    body_bytes: int = 32 * 2**20
    body_s: float = 30.0  # from the first byte of a body to its last
    text_chars: int = 65_536  # of all texts of the request
    stop_chars: int = 1_024  # of its stop strings, which are searched for at every token
    messages: int = 256
    items: int = 128  # inputs to embed, labels, candidates
    images: int = 16  # in one conversation, or to caption
    image_bytes: int = 8 * 2**20  # each, decoded from base64
    header_chars: int = 64  # of a data: URL, before the comma
    side: int = 16_384  # pixels
    pixels: int = 40_000_000  # of one image; an 8k frame has 33 million
    total_pixels: int = 100_000_000  # of all images; decoding them takes about 1.5 s of a core
    frames: int = 1

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
class Options:
    """Arguments of one app: models, callers, resources."""

    model: str  # NAME (its champion), NAME@alias, NAME:version, or the folder of an artifact
    challenger: str | None = None  # another one in the same notation, loaded next to the model
    share: float = 0.0  # share of the requests that the challenger answers
    home: str | None = None  # deployments are recorded here; $BRIDGEWORK_HOME or ./.bridgework
    tracking: str | None = None  # URI of the MLflow server; default: the store under home
    keys: str | None = None  # file of key digests; default: $BRIDGEWORK_API_KEYS
    dev: bool = False  # no key, and this machine only
    cors: tuple[
        str, ...
    ] = ()  # origins of web pages that may call, e.g. https://app.example; * all
    device: str | None = None  # of the model, as torch names it; default: a GPU if there is one
    cpus: float = 1.0  # per replica of the model
    # per replica of the model; default: 1 if the cluster has GPUs or can start nodes with GPUs
    gpus: float | None = None
    replicas: int = 1
    max_replicas: int | None = None  # if given, Serve scales between `replicas` and this
    ongoing: int = 8  # requests that one replica runs at once
    queued: int = 64  # requests that may wait for a replica; the next one is answered 429
    per_key: int | None = (
        None  # slots that one key may hold; default: 3/4 if there are several keys
    )
    held_bytes: int = 2**30  # of the bodies that a gateway holds at once
    batch: int = 16  # largest batch of embeddings
    batch_wait_s: float = 0.01
    max_new_tokens: int = 512  # largest max_tokens of a request
    timeout_s: float = 120.0  # for a complete answer; for a stream, for each piece
    limits: RequestLimits = RequestLimits()

    def __post_init__(self) -> None:
        for field in ("replicas", "ongoing", "queued", "per_key", "batch", "max_new_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise SpecError(f"{field} must be at least 1, got {value}")
        if not 0.0 <= self.share <= 1.0:
            raise SpecError(f"share must be in [0, 1], got {self.share:g}")
        if self.timeout_s <= 0:
            raise SpecError(f"timeout_s must be above 0, got {self.timeout_s:g}")
        for origin in self.cors:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise SpecError(
                    f"cors: not an origin. Got {origin!r}; expected SCHEME://HOST[:PORT], or *"
                )

    @property
    def slots(self) -> int:
        """Number of requests that one gateway holds at once, including the waiting ones."""
        return self.ongoing * (self.max_replicas or self.replicas) + self.queued

    def slots_per_key(self, keys: int) -> int:
        """Return the number of slots that one of `keys` keys may hold."""
        shared = self.slots if keys < 2 else max(1, self.slots * 3 // 4)
        return min(self.slots, self.per_key or shared)


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
