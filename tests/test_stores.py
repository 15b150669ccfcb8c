"""File systems of paths and URLs, and errors for unknown ones."""

import pytest

from bridgework.errors import DataError, ResourceError
from bridgework.storage import find_store


def test_a_path_and_a_url_find_their_stores() -> None:
    fs, path = find_store("memory://a/b")
    assert (fs.protocol, path) == ("memory", "/a/b")
    fs, path = find_store("/a/b")
    assert ("file" in fs.protocol, path) == (True, "/a/b")


@pytest.mark.parametrize("url", ["foo://x", "pipe://cat /etc/passwd"])
def test_unknown_protocol_is_an_error_with_the_known_ones(url: str) -> None:
    with pytest.raises(DataError, match=f"{url}.*Protocol not known.*memory"):
        find_store(url)


def test_near_protocol_is_suggested() -> None:
    with pytest.raises(DataError, match="did you mean 's3'"):
        find_store("s33://bucket/x")


def test_protocol_without_its_package_is_reported() -> None:
    with pytest.raises(
        ResourceError, match=r"oci://bucket.*needs a package that is not installed.*ocifs"
    ):
        find_store("oci://bucket/x")
