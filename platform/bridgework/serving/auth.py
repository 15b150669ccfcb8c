"""API keys: kept as sha256, compared in constant time, never logged.

BRIDGEWORK_API_KEYS holds keys (or their `sha256:` digests), separated by commas; a key file holds digests, one a line,
`#` begins a comment. Make one with `python -m bridgework.serving.auth`.
"""

import hashlib
import os
import re
import secrets
from hmac import compare_digest
from pathlib import Path

from bridgework.errors import SpecError

VARIABLE = "BRIDGEWORK_API_KEYS"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest(key: str) -> str:
    """`sha256:` and 64 hex digits. Keys are long and random, so a slow hash would add nothing."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Keys:
    """The keys that open an app."""

    def __init__(self, digests: frozenset[str]) -> None:
        self._digests = digests

    def __len__(self) -> int:
        return len(self._digests)

    def match(self, key: str) -> str | None:
        """The digest of a known key, None of another; every digest is compared, so the time reveals nothing."""
        given = digest(key)
        return next(iter([known for known in sorted(self._digests) if compare_digest(given, known)]), None)

    @classmethod
    def load(cls, file: str | None) -> "Keys":
        """From the key file if there is one, else from the environment. Raises SpecError where there is no key."""
        keys = cls(_from_file(Path(file)) if file else _from_environment())
        if not len(keys):
            raise SpecError(
                f"no API key: set {VARIABLE}, or keys=FILE with a sha256: digest a line, "
                "or dev=true for a server that answers this machine alone, without a key"
            )
        return keys


def _from_environment() -> frozenset[str]:
    words = [w.strip() for w in os.environ.get(VARIABLE, "").split(",") if w.strip()]
    return frozenset(w if _DIGEST.fullmatch(w) else digest(w) for w in words)


def _from_file(path: Path) -> frozenset[str]:
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise SpecError(f"keys={path} cannot be read: {error.strerror}") from None
    words = [line for line in lines if line]
    for number, word in enumerate(words, 1):
        if not _DIGEST.fullmatch(word):
            raise SpecError(f"{path}, key {number}: a key file holds digests only, sha256: and 64 hex digits")
    return frozenset(words)


if __name__ == "__main__":
    new = secrets.token_urlsafe(32)
    print(f"key     {new}\ndigest  {digest(new)}")
