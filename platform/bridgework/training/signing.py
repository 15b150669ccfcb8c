"""The key of a home, which signs the manifests of its checkpoints (HMAC-SHA256, RFC 2104).

A checkpoint is a program: DeepSpeed unpickles it. Hashes in a manifest show damage; only a signature
shows that this home wrote the manifest. The key is made on first use, readable by its owner alone.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from bridgework import storage
from bridgework.errors import RunError

FILE = "checkpoint.key"
OWNER_ONLY = 0o600


def key(home: Path, adopt: Callable[[bytes], object] | None = None) -> bytes:
    """The key of `home`, made now if there is none yet; then `adopt` first signs what is there.

    Raises RunError for a key file that cannot be read or is not a key.
    """
    file = home / FILE
    if not file.exists():
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{FILE}.lock", mode=OWNER_ONLY):  # of several workers, one makes it
            if not file.exists():
                fresh = secrets.token_hex(32)
                if adopt is not None:
                    adopt(bytes.fromhex(fresh))
                storage.write_atomic(file, fresh + "\n", mode=OWNER_ONLY)
    try:
        found = bytes.fromhex(file.read_text().strip())
        if len(found) < 16:
            raise ValueError("too short")
        if file.stat().st_mode & 0o077:
            file.chmod(OWNER_ONLY)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{file}: the key that signs checkpoints cannot be read. Got {error}; expected 64 hex digits in a file of "
            "its owner. Fix: restore it from a backup; or remove it, and the next run makes a new one, for which "
            "older checkpoints need --trust-checkpoints"
        ) from None
    return found


def name(key: bytes) -> str:
    """12 hex digits that tell keys apart and say nothing of them."""
    return hashlib.sha256(b"bridgework: name of a key" + key).hexdigest()[:12]


def sign(key: bytes, body: Mapping[str, Any]) -> str:
    """64 hex digits: the HMAC of a JSON body in canonical form."""
    return hmac.new(key, json.dumps(body, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def signed(key: bytes, body: Mapping[str, Any], signature: str) -> bool:
    """Verify the signature of `body`, in a time that does not depend on where they differ."""
    return hmac.compare_digest(sign(key, body), signature)
