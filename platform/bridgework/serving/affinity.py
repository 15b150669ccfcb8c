"""Choice of a replica for a request: requests about one image meet the same replica.

That replica has the image's features and the keys and values of its prompts in its caches, so it
reads only what is new. Each image orders the replicas by rendezvous hashing (Thaler and
Ravishankar 1998): a replica that is added or lost changes the first place of its own images only.

Serve sends the class by value to every process with a handle, so this module imports Ray alone.
"""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class ImageAffinity(RequestRouter):
    """Prefers the replica that an image selects, unless it is much busier than another one.

    The digest of the image is the `session_id` of the handle. A request without one gets the less
    busy of two random replicas, as with Serve's default.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """kwargs: `slack`, requests that the preferred replica may hold beyond the least busy."""
        self._slack = int(kwargs["slack"])

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas to try, in order; a replica that is full is passed over."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # before all are tried again
        image = pending_request.metadata.session_id
        if not image:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queues = {
            name: self.replica_queue_len_cache.get(replica.replica_id) or 0  # unknown: no traffic
            for name, replica in replicas.items()
        }
        return [[replicas[name]] for name in ranked(image, queues, self._slack)]


def ranked(image: str, queues: Mapping[str, int], slack: int) -> list[str]:
    """Return the replicas for an image, the preferred one first.

    queues: number of requests that each replica holds. Those with more than `slack` requests beyond
    the least busy one are last.
    """

    def place(replica: str) -> tuple[bool, bytes]:
        busy = queues[replica] > min(queues.values()) + slack
        return busy, hashlib.sha256(f"{image} {replica}".encode()).digest()

    return sorted(queues, key=place)
