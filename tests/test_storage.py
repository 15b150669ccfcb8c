"""Durable writes: files and folders appear complete or not at all; a full disk is reported."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bridgework import storage
from bridgework.errors import ResourceError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_file_is_replaced_without_temporary_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    for content in ("{}", b'{"a": 1}'):
        storage.write_atomic(file, content)
    assert file.read_bytes() == b'{"a": 1}'
    assert os.listdir(tmp_path) == ["recipe.json"]


def test_file_may_be_private(tmp_path: Path) -> None:
    storage.write_atomic(tmp_path / "key", "secret", mode=0o600)
    storage.write_atomic(tmp_path / "open", "words")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "plain").write_text("words")
    assert (tmp_path / "open").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_appears_complete_and_replaces_the_older_one(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with storage.publishing(tmp_path / "made") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / content).write_text(content)
            assert folder != tmp_path / "made"
    assert [path.name for path in (tmp_path / "made" / "inner").iterdir()] == ["two"]
    assert os.listdir(tmp_path) == ["made"]


def test_failed_publish_keeps_the_older_folder(tmp_path: Path) -> None:
    with storage.publishing(tmp_path / "made") as folder:
        (folder / "one").write_text("one")
    with (
        pytest.raises(ValueError, match="on the way"),
        storage.publishing(tmp_path / "made") as folder,
    ):
        (folder / "two").write_text("two")
        raise ValueError("on the way")
    assert os.listdir(tmp_path / "made") == ["one"]
    assert os.listdir(tmp_path) == ["made"]


def test_appended_lines_follow_each_other(tmp_path: Path) -> None:
    for line in ("a\n", "b\n"):
        storage.append(tmp_path / "log", line)
    assert (tmp_path / "log").read_text() == "a\nb\n"


def test_full_disk_is_reported_and_partial_files_are_removed(small_disk: Path) -> None:
    file = small_disk / "log"
    storage.append(file, "a line\n")
    with pytest.raises(
        ResourceError, match=r"the disk is full\. Got 0\.\d MB free on the disk of .*Fix: free some"
    ):
        storage.append(file, "x" * 100_000)
    assert file.read_text() == "a line\n"
    with pytest.raises(ResourceError, match="the disk is full"):
        storage.write_atomic(small_disk / "log", "x" * 100_000)
    with (
        pytest.raises(ResourceError, match="the disk is full"),
        storage.publishing(small_disk / "made") as folder,
    ):
        (folder / "file").write_bytes(b"x" * 100_000)
    assert os.listdir(small_disk) == ["log"] and file.read_text() == "a line\n"


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_full_disk_is_reported_for_errors_of_libraries(library: str, small_disk: Path) -> None:
    tensors = {"weight": torch.zeros(100_000)}
    with pytest.raises(ResourceError, match="the disk is full"), storage.disk_errors(small_disk):
        if library == "torch":
            torch.save(tensors, small_disk / "weights.pt")
        else:
            save_file(tensors, small_disk / "weights.safetensors")


def test_other_errors_are_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage.disk_errors(tmp_path):
        (tmp_path / "absent").read_text()
    with pytest.raises(RuntimeError, match="a rank"), storage.disk_errors(tmp_path):
        raise RuntimeError("a rank was left alone")
    assert storage.disk_full(OSError(errno.EDQUOT, "quota"))
    assert not storage.disk_full(OSError(errno.EACCES, "not yours"))
