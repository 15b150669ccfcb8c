"""File systems of paths and URLs, and errors for unknown ones."""

import os
import pickle
from pathlib import Path

import pytest

from bridgework import storage
from bridgework.errors import DataError, ResourceError, SpecError
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


@pytest.mark.parametrize("given", ["s3://bucket/a/b", "s3://bucket/a/b/", "s3:/bucket/a/b"])
def test_a_url_is_a_path_of_its_store(given: str) -> None:
    for place in (given, Path(given)):
        path = storage.locate(place)
        assert (str(path), storage.is_local(path)) == ("s3://bucket/a/b", False)
        assert (str(path / "c"), path.name, str(path.parent)) == (
            "s3://bucket/a/b/c",
            "b",
            "s3://bucket/a",
        )
        assert pickle.loads(pickle.dumps(path)) == path == storage.locate(path)
        with pytest.raises(TypeError):
            os.listdir(path)


@pytest.mark.parametrize("given", ["a/b", "/a/b", "file:///a/b", "/a/b c"])
def test_a_folder_is_a_local_path(given: str) -> None:
    assert storage.locate(given) == Path(given.removeprefix("file://"))
    assert storage.is_local(storage.locate(given))


def test_a_url_without_a_bucket_is_an_error() -> None:
    with pytest.raises(SpecError, match=r"'s3://': the URL has no bucket.*s3://BUCKET/FOLDER"):
        storage.locate("s3://")


@pytest.mark.parametrize("variable", ["BRIDGEWORK_STORE_WAIT_S", "BRIDGEWORK_CACHE_GB"])
@pytest.mark.parametrize("value", ["ten", "-1", "nan", "inf"])
def test_a_setting_that_is_no_number_is_an_error(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    read = storage.stores.wait_s if "WAIT" in variable else storage.node_cache.bound
    with pytest.raises(SpecError, match=f"{variable}: not a number. Got '{value}'"):
        read()
