"""Where files lie: a path, or the URL of a store that fsspec knows."""

from typing import Any

import fsspec

from bridgework.errors import DataError, ResourceError, suggest


def find_store(url: str) -> tuple[Any, str]:
    """The file system of `url`, and the path in it. Nothing is asked of the store.

    Raises DataError for a protocol that nobody knows, ResourceError for one whose package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ValueError as error:
        protocol = url.partition("://")[0]
        raise DataError(f"{url!r}: {error}{suggest(protocol, fsspec.available_protocols())}") from None
    except ImportError as error:
        raise ResourceError(f"{url!r} needs a package that is not here: {error}") from None
    return fs, path


def unreachable(file: str, error: Exception) -> ResourceError:
    """What to raise where a file's store does not answer, or refuses: it may be tried again."""
    return ResourceError(
        f"{file} cannot be reached ({type(error).__name__}: {error}); is its store up, and open to you?"
    )
