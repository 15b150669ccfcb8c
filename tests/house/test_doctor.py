"""The doctor says what is wrong, and what to do about it, before anything starts."""

from pathlib import Path

import pytest

from bridgework.cli import diagnostics


def by_name(home: Path) -> dict[str, diagnostics.Check]:
    return {check.name: check for check in diagnostics.checks(home)}


def test_a_tested_environment_passes_every_floor(tmp_path: Path) -> None:
    found = by_name(tmp_path)
    assert all(found[name].ok for name in ("python", "import platform", *diagnostics.FLOORS))


def test_what_fails_comes_with_advice(tmp_path: Path) -> None:
    assert all(check.advice for check in diagnostics.checks(tmp_path) if not check.ok)


def test_a_home_that_is_not_there_yet_is_judged_by_the_folder_it_will_stand_in(
    tmp_path: Path,
) -> None:
    home = tmp_path / "not" / "yet"
    assert by_name(home)["home"].ok
    assert not home.exists()


def test_a_home_that_cannot_be_written_fails() -> None:
    assert not by_name(Path("/proc/bridgework"))["home"].ok


@pytest.mark.parametrize(("mode", "ok"), [("token", True), ("TOKEN", True), ("disabled", False)])
def test_ray_without_tokens_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, ok: bool
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert by_name(tmp_path)["RAY_AUTH_MODE"].ok is ok
