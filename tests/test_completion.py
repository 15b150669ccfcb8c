"""Shell completion, as bash asks for it."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("bridgework tra", {"train", "trace", "traffic"}),
        ("bridgework show lla", {"llava"}),
        ("bridgework show llava:q", {"llava:quickstart"}),
        ("bridgework train llava --stage ", {"align", "instruct"}),
        ("bridgework train llava --set stages.align.op", {"stages.align.optim."}),
        ("bridgework train llava --set stages.align.optim.peak", {"stages.align.optim.peak_lr="}),
        ("bridgework train lava --set stages.", set()),
        ("bridgework data stats synthetic:sh", {"synthetic:shapes"}),
    ],
)
def test_words_are_completed(words: str, found: set[str]) -> None:
    program = "import sys; from bridgework.cli import app; app(prog_name='bridgework')"
    asked = {
        "_BRIDGEWORK_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True
    )
    assert set(done.stdout.split()) == found, done.stderr
