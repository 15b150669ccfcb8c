"""A checkpoint is whole or it is not there: what is damaged is seen, and the one before is taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bridgework.errors import RunError
from bridgework.training import checkpoint
from bridgework.training.checkpoint import Checkpoint

FILES = {"state/rank_0.pt": bytes(range(256)) * 40, "state/rank_1.pt": bytes(range(255, -1, -1)) * 40}


def write(stage: Path, step: int, attempt: str = "a1", *, keep: int = 2, fingerprint: str = "f") -> Checkpoint:
    folder = checkpoint.begin(stage, step, attempt)
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return checkpoint.complete(folder, step=step, world=2, attempt=attempt, fingerprint=fingerprint, keep=keep)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def steps(stage: Path) -> list[int]:
    return [found.step for found in checkpoint.checkpoints(stage)]


def test_what_was_written_is_found_as_it_was(tmp_path: Path) -> None:
    made = write(tmp_path, 10)
    found, passed = checkpoint.newest(tmp_path, "f")
    assert found == made
    assert (found.step, found.world, found.damage(), passed) == (10, 2, None, [])
    assert set(found.files) == set(FILES)


def test_manifest_is_last(tmp_path: Path) -> None:
    folder = checkpoint.begin(tmp_path, 10, "a1")
    (folder / "rank_0.pt").write_bytes(b"half")
    assert checkpoint.newest(tmp_path, "f") == (None, [])
    write(tmp_path, 5)
    shutil.copytree(tmp_path / "checkpoints/00000005-a1", tmp_path / "checkpoints/00000015-a2")
    (tmp_path / "checkpoints/00000015-a2/manifest.json").unlink()
    assert steps(tmp_path) == [5]


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{f"bit {at} of a file": lambda f, at=at: flip(f / "state/rank_1.pt", at) for at in (0, 5_000, -1)},
    "truncated": lambda f: (f / "state/rank_0.pt").write_bytes(FILES["state/rank_0.pt"][:-7]),
    "empty": lambda f: (f / "state/rank_0.pt").write_bytes(b""),
    "longer": lambda f: (f / "state/rank_0.pt").write_bytes(FILES["state/rank_0.pt"] + b"\0"),
    "missing": lambda f: (f / "state/rank_1.pt").unlink(),
    "swapped": lambda f: [
        (f / "state/rank_0.pt").rename(f / "x"),
        (f / "state/rank_1.pt").rename(f / "state/rank_0.pt"),
        (f / "x").rename(f / "state/rank_1.pt"),
    ],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_is_seen_and_the_one_before_is_taken(tmp_path: Path, how: str) -> None:
    write(tmp_path, 5)
    DAMAGE[how](write(tmp_path, 10).folder)
    found, passed = checkpoint.newest(tmp_path, "f")
    assert found is not None
    assert found.step == 5
    assert len(passed) == 1
    assert "step 10 is damaged: state/rank_" in passed[0]


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"step": 10}', "\xff{"])
def test_manifest_that_says_nothing_is_no_manifest(tmp_path: Path, content: str) -> None:
    write(tmp_path, 5)
    (write(tmp_path, 10).folder / "manifest.json").write_text(content, encoding="latin-1")
    assert steps(tmp_path) == [5]


def test_no_flipped_bit_of_a_manifest_goes_unseen(tmp_path: Path) -> None:
    write(tmp_path, 5)
    manifest = write(tmp_path, 10).folder / "manifest.json"
    whole, body = manifest.read_bytes(), json.loads(manifest.read_text())
    for at in range(len(whole)):
        flip(manifest, at)
        try:
            unchanged = json.loads(manifest.read_bytes()) == body  # a space that became a tab says the same
        except ValueError:
            unchanged = False
        assert steps(tmp_path) == ([10, 5] if unchanged else [5]), at
        manifest.write_bytes(whole)


def test_nothing_is_taken_where_all_are_damaged(tmp_path: Path) -> None:
    for step in (5, 10):
        flip(write(tmp_path, step).folder / "state/rank_0.pt", 3)
    found, passed = checkpoint.newest(tmp_path, "f")
    assert found is None
    assert len(passed) == 2


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 5, fingerprint="other")
    with pytest.raises(RunError, match="written by recipe other, this is f; give the run another name"):
        checkpoint.newest(tmp_path, "f")


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    assert steps(tmp_path) == [15, 10]


def test_sweep_removes_what_other_attempts_left_half_written(tmp_path: Path) -> None:
    write(tmp_path, 5, "a1")
    own, other = checkpoint.begin(tmp_path, 10, "a2"), checkpoint.begin(tmp_path, 10, "a1")
    checkpoint.sweep(tmp_path, "a2", 5)
    assert own.is_dir()
    assert not other.exists()
    assert steps(tmp_path) == [5]


def test_damaged_newest_does_not_push_out_good_ones(tmp_path: Path) -> None:
    for step in (15, 20):
        flip(write(tmp_path, step).folder / "state/rank_0.pt", 3)
    checkpoint.sweep(tmp_path, "a2", 0)
    write(tmp_path, 5, "a2")
    found, passed = checkpoint.newest(tmp_path, "f")
    assert found is not None
    assert (found.step, passed) == (5, [])


def test_step_may_be_written_again_by_a_later_attempt(tmp_path: Path) -> None:
    write(tmp_path, 5, "a1")
    write(tmp_path, 5, "a2")
    found, _ = checkpoint.newest(tmp_path, "f")
    assert found is not None
    assert found.step == 5
