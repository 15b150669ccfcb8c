"""Admission to a gateway: limits on running requests and arriving bodies, shared among the keys."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from bridgework.serving.errors import APIError, busy

GRACE_S = 1.0  # a younger body is not evicted by another one of the same key


class Admission:
    """Counts the requests and the bytes of one gateway.

    A request holds one of the `slots` from the end of its body to the end of its answer. A body
    that is still arriving holds none, so unfinished bodies block no other request. As many bodies
    as there are slots may arrive at once. Above that, the oldest body of the key that has most of
    them is evicted.
    """

    def __init__(self, *, slots: int, per_key: int, held_bytes: int) -> None:
        self.draining = False
        self._slots, self._per_key, self._held_bytes = slots, per_key, held_bytes
        self._running: Counter[str] = Counter()  # requests by key
        self._running_bytes = 0
        self._arrivals: list[Arrival] = []  # oldest first
        self._released = asyncio.Event()

    @property
    def running(self) -> int:
        """Number of requests that hold a slot."""
        return self._running.total()

    def check(self, key: str) -> None:
        """Raise APIError if this key may not have another slot: 503 while draining, else 429."""
        if self.draining:
            raise APIError(
                503, "the server is shutting down. Fix: try again", code="shutting_down", close=True
            )
        if self.running >= self._slots or self._running[key] >= self._per_key:
            raise busy()

    @contextmanager
    def slot(self, key: str, size: int) -> Iterator[None]:
        """Hold a slot for a request whose body has `size` bytes.

        Raises APIError as `check` does.
        """
        self.check(key)
        self._running[key] += 1
        self._running_bytes += size
        try:
            yield
        finally:
            self._running[key] -= 1
            self._running_bytes -= size
            if not self._running[key]:
                del self._running[key]
            self._released.set()

    @asynccontextmanager
    async def arrival(self, key: str, limit_s: float) -> "AsyncIterator[Arrival]":
        """Register a body that arrives; report its bytes with `grow`.

        Raises APIError: 408 after `limit_s` seconds, 429 if there is no room or the body is
        evicted.
        """
        self._make_room(key)
        try:
            async with asyncio.timeout(limit_s) as deadline:
                arrival = Arrival(key, asyncio.get_running_loop().time(), deadline)
                self._arrivals.append(arrival)
                try:
                    yield arrival
                finally:
                    evicted = arrival not in self._arrivals
                    if not evicted:
                        self._arrivals.remove(arrival)
        except TimeoutError:
            if evicted:
                raise busy(close=True) from None
            message = (
                f"the body: not complete after {limit_s:g} s. Fix: send it faster, or send less"
            )
            raise APIError(408, message, code="body_timeout", close=True) from None

    def grow(self, arrival: "Arrival", size: int) -> None:
        """Report `size` more bytes of a body.

        Raises APIError (429) if the bytes of all bodies exceed the limit. First the oldest bodies
        of the key with the most arriving bytes are evicted, unless it is this key.
        """
        arrival.size += size
        while self._running_bytes + sum(other.size for other in self._arrivals) > self._held_bytes:
            sizes: Counter[str] = Counter()
            for other in self._arrivals:
                sizes[other.key] += other.size
            largest = max(sizes, key=lambda key: (sizes[key], key == arrival.key))
            if largest == arrival.key:
                raise busy(close=True)
            self._evict(next(other for other in self._arrivals if other.key == largest))

    async def drain(self, limit_s: float) -> int:
        """Refuse new requests and wait for the running ones, at most `limit_s` seconds.

        Returns the number of requests that still run.
        """
        self.draining = True
        try:
            async with asyncio.timeout(limit_s):
                while self.running:
                    self._released.clear()
                    await self._released.wait()
        except TimeoutError:
            pass
        return self.running

    def _make_room(self, key: str) -> None:
        """Evict a body if as many arrive as there are slots. Raises APIError (429)."""
        if len(self._arrivals) < self._slots:
            return
        counts = Counter(arrival.key for arrival in self._arrivals)
        counts[key] += 1
        largest = max(counts, key=lambda other: (counts[other], other == key))
        oldest = next(arrival for arrival in self._arrivals if arrival.key == largest)
        if largest == key and asyncio.get_running_loop().time() - oldest.since < GRACE_S:
            raise busy(close=True)
        self._evict(oldest)

    def _evict(self, arrival: "Arrival") -> None:
        self._arrivals.remove(arrival)
        if not arrival.deadline.expired():
            arrival.deadline.reschedule(asyncio.get_running_loop().time())


@dataclass(eq=False)
class Arrival:
    """A body that is arriving."""

    key: str
    since: float  # time of the event loop, seconds
    deadline: asyncio.Timeout
    size: int = 0  # bytes so far
