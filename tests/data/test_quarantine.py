"""The quarantine table."""

from pathlib import Path

import pytest

from bridgework.data.quarantine import FLUSH_ROWS, BadSample, Quarantine, Reason, clear, records
from bridgework.errors import DataError

CUT = BadSample(Reason.TRUNCATED, "ends at byte 7")


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "q") if request.param == "local" else f"memory://{tmp_path.name}/q"


def test_table_contains_every_row_with_its_reason(folder: str) -> None:
    quarantine = Quarantine(folder)
    for row in range(FLUSH_ROWS + 2):
        quarantine.add("d1", f"key-{row}", row, CUT)
    assert len(list(records(folder))) == FLUSH_ROWS  # a full part is written at once
    quarantine.flush()
    quarantine.flush()
    found = list(records(folder))
    assert [record.row for record in found] == list(range(FLUSH_ROWS + 2))
    assert (
        found[3].key == "key-3"
        and found[3].reason is Reason.TRUNCATED
        and found[3].detail == "ends at byte 7"
    )


def test_row_that_is_added_again_counts_once(folder: str) -> None:
    quarantine = Quarantine(folder)
    for dataset in ("d1", "d1", "d2"):
        quarantine.add(dataset, "k", 0, CUT)
    quarantine.flush()
    assert len(quarantine) == len(list(records(folder))) == 2


def test_readers_that_share_a_table_do_not_overwrite_each_other(folder: str) -> None:
    for reader in range(3):
        quarantine = Quarantine(folder)
        quarantine.add("d", f"{reader}", reader, CUT)
        quarantine.flush()
    assert {record.row for record in records(folder)} == {0, 1, 2}


def test_more_than_the_allowed_share_is_an_error_with_the_path_of_the_table(folder: str) -> None:
    quarantine = Quarantine(folder)
    for row in range(5):
        quarantine.add("d", f"{row}", row, CUT)
    quarantine.check(1_000)  # exactly the share of 0.5 % is still allowed
    quarantine.add("d", "5", 5, BadSample(Reason.CORRUPT, "x"))
    with pytest.raises(
        DataError,
        match=r"6 of 1000 rows are bad \(5 truncated, 1 corrupt\)\. Got 0.60%; at most 0.50%",
    ) as caught:
        quarantine.check(1_000)
    assert folder in str(caught.value) and len(list(records(folder))) == 6


def test_only_complete_parts_are_visible_and_clear_keeps_other_files(tmp_path: Path) -> None:
    quarantine = Quarantine(str(tmp_path))
    quarantine.add("d", "k", 0, CUT)
    quarantine.flush()
    (tmp_path / "part-9.jsonl.tmp").write_text('{"dataset": ')
    (tmp_path / "notes.txt").write_text("mine")
    assert len(list(records(str(tmp_path)))) == 1
    clear(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
