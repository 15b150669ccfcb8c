"""Signatures of checkpoint manifests with the key of a home (HMAC-SHA256, RFC 2104).

Loading a checkpoint runs code, because DeepSpeed unpickles it. Hashes in a manifest detect damage;
only a signature proves that this home wrote the manifest. The key is created on first use and is
readable by its owner alone. In a store, it is readable by everyone who may read the home.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bridgework import storage
from bridgework.errors import RunError

FILE = "checkpoint.key"
OWNER_ONLY = 0o600


def key(home: Path, adopt: Callable[[bytes], object] | None = None) -> bytes:
    """Read the key of `home`, or create it after `adopt` has signed the existing checkpoints.

    Raises RunError for a key file that cannot be read or is not a key.
    """
    file = home / FILE
    if not file.exists():
        home.mkdir(parents=True, exist_ok=True)
        with storage.lock(file, mode=OWNER_ONLY):  # one of several workers creates it
            if not file.exists():
                new = secrets.token_hex(32)
                if adopt is not None:
                    adopt(bytes.fromhex(new))
                storage.write_atomic(file, new + "\n", mode=OWNER_ONLY)
    try:
        stored = bytes.fromhex(file.read_text().strip())
        if len(stored) < 16:
            raise ValueError("too short")
        if storage.is_local(file) and file.stat().st_mode & 0o077:
            file.chmod(OWNER_ONLY)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{file}: the key that signs checkpoints cannot be read. Got {error}; expected 64 hex "
            "digits in a file of its owner. Fix: restore it from a backup; or remove it, so that "
            "the next run creates a new one and older checkpoints need --trust-checkpoints"
        ) from None
    return stored


def name(key: bytes) -> str:
    """Return 12 hex digits that identify a key without revealing it."""
    return hashlib.sha256(b"bridgework: name of a key" + key).hexdigest()[:12]


def sign(key: bytes, body: Mapping[str, Any]) -> str:
    """Return the HMAC of a JSON body in canonical form, as 64 hex digits."""
    return hmac.new(key, json.dumps(body, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def verify(key: bytes, body: Mapping[str, Any], signature: str) -> bool:
    """Return True if `signature` is that of `body`; the comparison takes constant time."""
    return hmac.compare_digest(sign(key, body), signature)
