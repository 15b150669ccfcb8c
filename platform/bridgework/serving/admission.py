"""Admission to a gateway: how many requests run and how many bodies arrive at once, shared fairly among the keys."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from bridgework.serving.errors import APIError, busy

GRACE_S = 1.0  # a body that takes no longer is not put out by another one of the same key


@dataclass(eq=False)
class Arrival:
    """A body that is arriving."""

    key: str
    since: float
    deadline: asyncio.Timeout
    size: int = 0  # bytes so far


class Admission:
    """Counts the requests of one gateway.

    A body that is still arriving takes none of the `places`, so unfinished bodies keep nobody out. As many bodies as
    there are places may arrive at once. When there are more, the oldest of the key that has most of them is put out.
    """

    def __init__(self, *, places: int, per_key: int, held_bytes: int) -> None:
        self.draining = False
        self._places, self._per_key, self._held_bytes = places, per_key, held_bytes
        self._running: Counter[str] = Counter()
        self._running_bytes = 0
        self._arrivals: list[Arrival] = []  # by age
        self._left = asyncio.Event()

    @property
    def running(self) -> int:
        return self._running.total()

    def check(self, key: str) -> None:
        """Raises Refusal where no place is free for this key: 503 while draining, else 429."""
        if self.draining:
            raise APIError(
                503, "the server is shutting down. Fix: try again", code="shutting_down", close=True
            )
        if self.running >= self._places or self._running[key] >= self._per_key:
            raise busy()

    @contextmanager
    def place(self, key: str, size: int) -> Iterator[None]:
        """Hold a place for a request whose body has `size` bytes. Raises Refusal as `check` does."""
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
            self._left.set()

    @asynccontextmanager
    async def arrival(self, key: str, limit_s: float) -> AsyncIterator[Arrival]:
        """Room for a body that arrives; `grow` reports its bytes.

        Raises Refusal: 408 after `limit_s` seconds, 429 where there is no room for it, or no longer.
        """
        self._make_room(key)
        try:
            async with asyncio.timeout(limit_s) as deadline:
                arrival = Arrival(key, asyncio.get_running_loop().time(), deadline)
                self._arrivals.append(arrival)
                try:
                    yield arrival
                finally:
                    put_out = arrival not in self._arrivals
                    if not put_out:
                        self._arrivals.remove(arrival)
        except TimeoutError:
            if put_out:
                raise busy(close=True) from None
            message = (
                f"the body: not complete after {limit_s:g} s. Fix: send it faster, or send less"
            )
            raise APIError(408, message, code="body_timeout", close=True) from None

    def grow(self, arrival: Arrival, size: int) -> None:
        """Report `size` more bytes of a body. Raises Refusal (429) where all bodies together are too large."""
        arrival.size += size
        while self._running_bytes + sum(other.size for other in self._arrivals) > self._held_bytes:
            sizes: Counter[str] = Counter()
            for other in self._arrivals:
                sizes[other.key] += other.size
            most = max(sizes, key=lambda key: (sizes[key], key == arrival.key))
            if most == arrival.key:
                raise busy(close=True)
            self._put_out(next(other for other in self._arrivals if other.key == most))

    async def drain(self, limit_s: float) -> int:
        """Refuse new requests, wait for the running ones, at most `limit_s` seconds; return how many are left."""
        self.draining = True
        try:
            async with asyncio.timeout(limit_s):
                while self.running:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            pass
        return self.running

    def _make_room(self, key: str) -> None:
        if len(self._arrivals) < self._places:
            return
        counts = Counter(arrival.key for arrival in self._arrivals)
        counts[key] += 1
        most = max(counts, key=lambda other: (counts[other], other == key))
        oldest = next(arrival for arrival in self._arrivals if arrival.key == most)
        if most == key and asyncio.get_running_loop().time() - oldest.since < GRACE_S:
            raise busy(close=True)
        self._put_out(oldest)

    def _put_out(self, arrival: Arrival) -> None:
        self._arrivals.remove(arrival)
        if not arrival.deadline.expired():
            arrival.deadline.reschedule(asyncio.get_running_loop().time())
