"""Checkpoints: complete or absent; damage is detected, and the checkpoint before it is used."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgework.errors import ResourceError, RunError
from bridgework.training import checkpoint, signing
from bridgework.training.checkpoint import Checkpoint, Unusable

FILES = {
    "state/rank_0.pt": bytes(range(256)) * 40,
    "state/rank_1.pt": bytes(range(255, -1, -1)) * 40,
}


def write(
    stage: Path, step: int, attempt: str = "a1", *, keep: int = 2, fingerprint: str = "f"
) -> Checkpoint:
    folder = checkpoint.begin(stage, step, attempt)
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return checkpoint.complete(
        folder, step=step, world=2, attempt=attempt, fingerprint=fingerprint, keep=keep
    )


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def steps(stage: Path) -> list[int]:
    return [found.step for found in checkpoint.checkpoints(stage)]


def test_written_checkpoint_is_found_unchanged(tmp_path: Path) -> None:
    made = write(tmp_path, 10)
    found, passed = checkpoint.latest(tmp_path, "f")
    assert found == made
    assert (found.step, found.world, found.find_corruption(), passed) == (10, 2, None, [])
    assert set(found.files) == set(FILES)


def test_manifest_is_written_last(tmp_path: Path) -> None:
    folder = checkpoint.begin(tmp_path, 10, "a1")
    (folder / "rank_0.pt").write_bytes(b"half")
    assert checkpoint.latest(tmp_path, "f") == (None, [])
    write(tmp_path, 5)
    shutil.copytree(tmp_path / "checkpoints/00000005-a1", tmp_path / "checkpoints/00000015-a2")
    (tmp_path / "checkpoints/00000015-a2/manifest.json").unlink()
    assert steps(tmp_path) == [5]


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{
        f"bit {at} of a file": lambda f, at=at: flip(f / "state/rank_1.pt", at)
        for at in (0, 5_000, -1)
    },
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
def test_damage_is_detected_and_the_checkpoint_before_is_used(tmp_path: Path, how: str) -> None:
    write(tmp_path, 5)
    DAMAGE[how](write(tmp_path, 10).folder)
    found, passed = checkpoint.latest(tmp_path, "f")
    assert found is not None
    assert found.step == 5
    assert len(passed) == 1
    assert "step 10 is damaged: state/rank_" in passed[0]


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"step": 10}', "\xff{"])
def test_manifest_without_content_is_damage(tmp_path: Path, content: str) -> None:
    write(tmp_path, 5)
    (write(tmp_path, 10).folder / "manifest.json").write_text(content, encoding="latin-1")
    assert steps(tmp_path) == [5]


def test_every_flipped_bit_of_a_manifest_is_detected(tmp_path: Path) -> None:
    write(tmp_path, 5)
    manifest = write(tmp_path, 10).folder / "manifest.json"
    whole, body = manifest.read_bytes(), json.loads(manifest.read_text())
    for at in range(len(whole)):
        flip(manifest, at)
        try:
            unchanged = (
                json.loads(manifest.read_bytes()) == body
            )  # a space that became a tab says the same
        except ValueError:
            unchanged = False
        assert steps(tmp_path) == ([10, 5] if unchanged else [5]), at
        manifest.write_bytes(whole)


def test_no_checkpoint_is_used_if_all_are_damaged(tmp_path: Path) -> None:
    for step in (5, 10):
        flip(write(tmp_path, step).folder / "state/rank_0.pt", 3)
    found, passed = checkpoint.latest(tmp_path, "f")
    assert found is None
    assert len(passed) == 2


def test_checkpoint_of_another_recipe_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, 5, fingerprint="other")
    with pytest.raises(
        RunError, match=r"another recipe\. Got other; expected f\. Fix: give the run another name"
    ):
        checkpoint.latest(tmp_path, "f")


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    assert steps(tmp_path) == [15, 10]


def test_remove_stale_removes_partial_checkpoints_of_other_attempts(tmp_path: Path) -> None:
    write(tmp_path, 5, "a1")
    own, other = checkpoint.begin(tmp_path, 10, "a2"), checkpoint.begin(tmp_path, 10, "a1")
    checkpoint.remove_stale(tmp_path, "a2", 5)
    assert own.is_dir()
    assert not other.exists()
    assert steps(tmp_path) == [5]


def test_damaged_newest_does_not_evict_valid_ones(tmp_path: Path) -> None:
    for step in (15, 20):
        flip(write(tmp_path, step).folder / "state/rank_0.pt", 3)
    checkpoint.remove_stale(tmp_path, "a2", 0)
    write(tmp_path, 5, "a2")
    found, passed = checkpoint.latest(tmp_path, "f")
    assert found is not None
    assert (found.step, passed) == (5, [])


def test_later_attempt_may_write_a_step_again(tmp_path: Path) -> None:
    write(tmp_path, 5, "a1")
    write(tmp_path, 5, "a2")
    found, _ = checkpoint.latest(tmp_path, "f")
    assert found is not None
    assert found.step == 5


# --- files that are not in the manifest ---------------------------------------------------------

EXTRA: dict[str, Callable[[Path], object]] = {
    "a file": lambda f: (f / "state/rank_2.pt").write_bytes(b"x"),
    "a hidden file": lambda f: (f / ".x").write_bytes(b"x"),
    "a file in a folder of its own": lambda f: [
        (f / "state/more").mkdir(),
        (f / "state/more/x.pt").write_bytes(b"x"),
    ],
    "a link to a file": lambda f: os.symlink(f / "state/rank_0.pt", f / "state/rank_2.pt"),
    "a link to a folder": lambda f: os.symlink(f / "state", f / "more"),
    "a link that leads nowhere": lambda f: os.symlink(f / "absent", f / "state/rank_2.pt"),
}


@pytest.mark.parametrize("what", EXTRA)
def test_file_missing_from_the_manifest_is_damage(tmp_path: Path, what: str) -> None:
    """DeepSpeed and its converter load all files with a known name."""
    write(tmp_path, 5)
    EXTRA[what](write(tmp_path, 10).folder)
    found, passed = checkpoint.latest(tmp_path, "f")
    assert found is not None and found.step == 5
    assert len(passed) == 1 and "is not in the manifest, so the folder is not read" in passed[0]


def test_listed_file_replaced_by_a_link_is_damage(tmp_path: Path) -> None:
    file = write(tmp_path, 10).folder / "state/rank_0.pt"
    elsewhere = file.rename(tmp_path / "elsewhere.pt")
    file.symlink_to(elsewhere)
    assert checkpoint.latest(tmp_path, "f")[1] == [
        "checkpoint of step 10 is damaged: state/rank_0.pt is a link"
    ]


def test_manifest_with_a_file_outside_its_folder_is_damage(tmp_path: Path, home: Path) -> None:
    made = write(tmp_path, 10)
    outside = tmp_path / "checkpoints/outside.pt"
    outside.write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    rewrite(made.folder, home, files={"../outside.pt": [1, digest]})
    assert "a file is outside the folder" in checkpoint.latest(tmp_path, "f")[1][0]


# --- who wrote it ----------------------------------------------------------------------------------------------------


def rewrite(folder: Path, home: Path | None, *, sign: bool = True, **changed: Any) -> None:
    """Change fields of the manifest, with a valid sha256 and, with a home, a valid signature."""
    manifest = folder / "manifest.json"
    body = {**json.loads(manifest.read_text()), **changed}
    body.pop("sha256")
    if home is not None and sign:
        body.pop("signature")
        body["signature"] = signing.sign(signing.key(home), body)
    manifest.write_text(json.dumps(body | {"sha256": checkpoint._digest(body)}))


def unsigned(folder: Path) -> None:
    """Rewrite a manifest as an older version of bridgework did."""
    manifest = folder / "manifest.json"
    body = json.loads(manifest.read_text())
    for field in ("schema", "key", "signature", "sha256"):
        body.pop(field)
    manifest.write_text(json.dumps(body | {"sha256": checkpoint._digest(body)}))


def test_key_is_private_and_stable(tmp_path: Path) -> None:
    first = signing.key(tmp_path)
    assert signing.key(tmp_path) == first
    assert (tmp_path / "checkpoint.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "checkpoint.key").chmod(0o644)
    assert signing.key(tmp_path) == first
    assert (tmp_path / "checkpoint.key").stat().st_mode & 0o777 == 0o600


def test_concurrent_processes_create_one_key(tmp_path: Path) -> None:
    code = "import sys, pathlib; from bridgework.training import signing; print(signing.key(pathlib.Path(sys.argv[1])))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    assert len({process.communicate()[0] for process in started}) == 1


@pytest.mark.parametrize("content", ["", "not hex", "ab"])
def test_broken_key_is_reported_with_a_fix(tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoint.key").write_text(content)
    with pytest.raises(
        RunError, match=r"the key that signs checkpoints cannot be read.*--trust-checkpoints"
    ):
        signing.key(tmp_path)


FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no signature": (unsigned, "has no signature"),
    "another world": (lambda f: rewrite(f, None, world=3), "has a wrong signature"),
    "another signature": (lambda f: rewrite(f, None, signature="0" * 64), "has a wrong signature"),
    "another key": (
        lambda f: rewrite(f, None, key="0" * 12),
        "is signed with the key 000000000000 and the key of",
    ),
}


@pytest.mark.parametrize("how", FORGED)
def test_checkpoint_not_signed_by_this_home_is_rejected_until_trusted(
    tmp_path: Path, how: str
) -> None:
    write(tmp_path, 5)
    folder = write(tmp_path, 10).folder
    forge, said = FORGED[how]
    forge(folder)
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(
        RunError, match=f"not trusted, because its manifest {said}.*add --trust-checkpoints"
    ):
        checkpoint.latest(tmp_path, "f")
    with pytest.raises(RunError, match="not trusted"):
        checkpoint.verify(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    assert checkpoint.trust(tmp_path) == 1
    found, _ = checkpoint.latest(tmp_path, "f")
    assert found is not None and found.step == 10


def test_damaged_checkpoint_cannot_be_trusted(tmp_path: Path) -> None:
    folder = write(tmp_path, 10).folder
    unsigned(folder)
    (folder / "state/rank_2.pt").write_bytes(b"x")
    assert checkpoint.trust(tmp_path) == 0
    with pytest.raises(RunError, match="not trusted"):
        checkpoint.latest(tmp_path, "f")


def test_checkpoint_of_another_home_is_rejected_until_trusted(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    folder = checkpoint.begin(tmp_path, 5, "a1")
    (folder / "rank_0.pt").write_bytes(b"x")
    checkpoint.complete(
        folder, step=5, world=1, attempt="a1", fingerprint="f", keep=2, home=tmp_path / "one"
    )
    assert checkpoint.latest(tmp_path, "f", home=tmp_path / "one")[0] is not None
    with pytest.raises(
        RunError, match=r"is signed with the key \w{12} and the key of .*other is \w{12}"
    ):
        checkpoint.latest(tmp_path, "f", home=tmp_path / "other")
    assert checkpoint.trust(tmp_path, home=tmp_path / "other") == 1
    assert checkpoint.latest(tmp_path, "f", home=tmp_path / "other")[0] is not None


def test_new_key_signs_checkpoints_of_older_versions(tmp_path: Path) -> None:
    stage = tmp_path / "runs" / "monday" / "align"
    unsigned(write(stage, 5).folder)
    found, passed = checkpoint.latest(stage, "f", home=tmp_path)
    assert found is not None and (found.step, passed) == (5, [])
    unsigned(write(stage, 10).folder)  # one that comes later has no such excuse
    with pytest.raises(RunError, match="has no signature"):
        checkpoint.latest(stage, "f", home=tmp_path)


# --- what is not understood is not touched ---------------------------------------------------------------------------


def test_checkpoint_of_a_newer_version_stops_the_run_and_is_not_removed(tmp_path: Path) -> None:
    write(tmp_path, 5)
    folder = write(tmp_path, 10).folder
    rewrite(folder, None, schema=2, added="later")
    for look in (checkpoint.latest, checkpoint.resume, checkpoint.cursor):
        with pytest.raises(
            RunError, match=r"newer version of bridgework\. Got a manifest of schema 2; expected 1"
        ):
            look(tmp_path, "f")
    assert folder.is_dir() and steps(tmp_path) == [5]
    checkpoint.prune(tmp_path, 1)
    assert folder.is_dir()


MALFORMED = {
    "no manifest": None, "empty": "", "a list": "[]", "no fields": "{}", "not JSON": "{", "deep": "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("content", MALFORMED)
def test_unreadable_manifest_is_reported_and_its_folder_not_removed(
    tmp_path: Path, content: str
) -> None:
    write(tmp_path, 5)
    folder = write(tmp_path, 10).folder
    (folder / "manifest.json").unlink()
    if (text := MALFORMED[content]) is not None:
        (folder / "manifest.json").write_text(text)
    found, passed = checkpoint.resume(tmp_path, "f")
    assert found is not None and found.step == 5
    assert len(passed) == 1 and passed[0].startswith("checkpoint of step 10 is damaged: ")
    checkpoint.remove_stale(tmp_path, "a2", 5)
    moved = tmp_path / "checkpoints/damaged" / folder.name
    assert (moved / "state/rank_0.pt").read_bytes() == FILES["state/rank_0.pt"]


@pytest.mark.parametrize(
    "field", [{"step": "10"}, {"world": 0}, {"attempt": 7}, {"files": []}, {"step": -10}]
)
def test_signed_manifest_with_invalid_fields_is_damage(
    tmp_path: Path, home: Path, field: dict[str, Any]
) -> None:
    write(tmp_path, 5)
    rewrite(write(tmp_path, 10).folder, home, **field)
    found, passed = checkpoint.latest(tmp_path, "f")
    assert found is not None and found.step == 5 and len(passed) == 1


STRAY: dict[str, Callable[[Path], object]] = {
    "0-backup": lambda p: p.mkdir(),
    "12": lambda p: p.write_text("x"),
    "notes.txt": lambda p: p.write_text("x"),
    "00000012": lambda p: p.mkdir(),
    "latest": lambda p: p.symlink_to(p.parent),
    ".cache": lambda p: p.mkdir(),
    "backup": lambda p: shutil.copytree(p.parent / "00000010-a1", p),
}


@pytest.mark.parametrize("name", STRAY)
def test_stray_folders_and_files_are_ignored(tmp_path: Path, name: str) -> None:
    for step in (5, 10):
        write(tmp_path, step)
    STRAY[name](tmp_path / "checkpoints" / name)
    found, passed = checkpoint.resume(tmp_path, "f")
    assert found is not None and (found.step, passed) == (10, [])
    checkpoint.remove_stale(tmp_path, "a2", 10)
    write(tmp_path, 15, keep=1)
    assert os.path.lexists(tmp_path / "checkpoints" / name)
    assert steps(tmp_path) == [15]


def test_folder_with_another_name_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10).folder.rename(tmp_path / "checkpoints/00000099-a1")
    found, passed = checkpoint.resume(tmp_path, "f")
    assert found is not None and found.step == 5
    assert passed == [
        "checkpoint of step 99 is damaged: the folder is not named for step 10, attempt a1"
    ]


# --- where none is left ----------------------------------------------------------------------------------------------


def test_stage_with_only_damaged_checkpoints_does_not_start_over_by_itself(
    tmp_path: Path,
) -> None:
    for step in (5, 10):
        flip(write(tmp_path, step).folder / "state/rank_0.pt", 3)
    for look in (checkpoint.resume, checkpoint.cursor):
        with pytest.raises(
            Unusable, match=r"no checkpoint can be used.*step 10.*step 5.*add --start-over"
        ):
            look(tmp_path, "f")
    checkpoint.move_to_damaged(tmp_path / "checkpoints/00000010-a1")
    checkpoint.move_to_damaged(tmp_path / "checkpoints/00000005-a1")
    with pytest.raises(Unusable, match="damaged/00000005-a1 was found damaged before"):
        checkpoint.resume(tmp_path, "f")
    kept = checkpoint.start_over(tmp_path)
    assert checkpoint.resume(tmp_path, "f") == (None, [])
    assert len(list(kept.rglob("rank_0.pt"))) == 2


def test_make_room_removes_older_checkpoints_but_never_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step, keep=3)
    checkpoint.make_room(tmp_path, 1)
    assert steps(tmp_path) == [15, 10, 5]
    with pytest.raises(ResourceError, match="the disk is full"):
        checkpoint.make_room(tmp_path, 10**18)
    assert steps(tmp_path) == [15]
