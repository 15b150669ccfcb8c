"""Errors: messages and their length."""

import pickle

import pytest

from bridgework import errors
from bridgework.errors import MESSAGE_CHARS, BridgeworkError, ResourceError

LEAVES = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, BridgeworkError)
]


@pytest.mark.parametrize("error", LEAVES)
def test_long_message_keeps_its_ends(error: type[BridgeworkError]) -> None:
    assert str(error("x" * MESSAGE_CHARS)) == "x" * MESSAGE_CHARS
    message = str(error("the name " + "y" * 1_000_000 + " is unknown"))
    assert (
        message.startswith("the name yyy")
        and message.endswith("yyy is unknown")
        and "[992,120 characters]" in message
    )
    assert len(message) <= MESSAGE_CHARS


def test_errors_travel_between_processes() -> None:
    sent = ResourceError("z" * 100_000)
    assert str(pickle.loads(pickle.dumps(sent))) == str(sent)
