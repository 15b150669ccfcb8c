"""Keeps pairs whose caption has enough vowels: a curation of one's own, to see what holds for every one."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from bridgework.config import config_class
from bridgework.curation.runner import Annotation, Decision, Model, Rows, bad
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Sample
from bridgework.errors import DataError


@config_class
class Vowels:
    """`desk` is a folder in which `judged` grows by every row.

    `stop` names a row at which the process is interrupted, and `kill` one at which it is killed.
    """

    desk: str
    letters: str = "aeiou"
    at_least: int = 1
    copies: int = 1
    model: Model | None = None

    drawn: ClassVar[tuple[str, ...]] = ("letters",)

    def models(self, home: Path) -> dict[str, str]:
        return {"letters": f"digest of {self.letters}"}

    def judge(self, home: Path) -> "VowelJudge":
        return VowelJudge(self.letters, Path(self.desk))

    def decide(self, rows: Rows) -> Iterator[Decision]:
        most = max((fact["vowels"] for _, fact in rows()), default=0)
        for sample, fact in rows():
            note = f"{fact['vowels']} of at most {most}"
            if fact["vowels"] < self.at_least:
                yield Decision("too few vowels", note=note)
            else:
                told = replace(sample, provenance={"vowels.score": str(fact["vowels"])})
                yield Decision("kept", (told,) * self.copies, note)


class VowelJudge:
    def __init__(self, letters: str, desk: Path) -> None:
        self._letters, self._desk = letters, desk

    def __call__(self, samples: Sequence[Sample]) -> list[Annotation]:
        return [self._fact(sample) for sample in samples]

    def _fact(self, sample: Sample) -> Annotation:
        if self._told("stop", sample):
            raise KeyboardInterrupt
        if self._told("kill", sample):
            os.kill(os.getpid(), signal.SIGKILL)
        if sample.text == "crash":
            raise DataError("the endpoint does not answer; start it")
        with (self._desk / "judged").open("a") as log:
            log.write(sample.key + "\n")
        if sample.text.startswith("?"):
            return bad(BadSample(Reason.BAD_ROW, "a question is no caption"))
        return {"vowels": sum(letter in self._letters for letter in sample.text)}

    def _told(self, name: str, sample: Sample) -> bool:
        file = self._desk / name
        if found := file.is_file() and file.read_text() == sample.key:
            file.unlink()
        return found
