"""API keys: stored as digests, and only valid keys match."""

import hashlib
from pathlib import Path

import pytest

from bridgework.errors import SpecError
from bridgework.serving.auth import VARIABLE, Keys, digest


def test_digest_is_plain_sha256() -> None:
    assert digest("abc") == f"sha256:{hashlib.sha256(b'abc').hexdigest()}"


def test_only_keys_of_the_environment_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f" first ,{digest('second')},, ")
    keys = Keys.load(None)
    assert len(keys) == 2
    assert (keys.match("first"), keys.match("second")) == (digest("first"), digest("second"))
    assert not any(
        keys.match(k) for k in ("", "third", "first ", digest("second"), "sch\udcfflüssel")
    )


def test_a_file_of_digests_may_hold_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the web front\n{digest('k1')}  # until May\n\n{digest('k2')}\n")
    assert Keys.load(str(file)).match("k1")
    assert Keys.load(str(file)).match("k2")


def test_plain_key_in_a_file_is_rejected_and_not_printed(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("very-secret\n")
    with pytest.raises(SpecError, match="digests only") as caught:
        Keys.load(str(file))
    assert "very-secret" not in str(caught.value)


def test_missing_keys_are_an_error_with_a_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(SpecError, match="dev=true"):
        Keys.load(None)
    with pytest.raises(SpecError, match="cannot be read"):
        Keys.load(str(tmp_path / "none"))


def test_keys_are_not_stored_in_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "very-secret")
    assert "very-secret" not in str(vars(Keys.load(None)))
