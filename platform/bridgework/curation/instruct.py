"""From captions and boxes to instructions (LLaVA, arXiv:2304.08485, 3): conversation, detail and complex reasoning.

A language model that sees no picture writes them, asked with two examples of each kind (`prompts/`, our own words): any
OpenAI-compatible endpoint (`endpoint`, `model`), or one on this machine (`lm`). What does not read as such a talk, or
tells on its source, is asked for once more and then dropped. Facts hold the answers as they came: deciding again costs
no call.

Rows of one image are asked about together where they are neighbors in a row group with the same bytes, as COCO's five
captions are. A picture that the border of two row groups parts is asked about twice; the first answers go on.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import cycle, groupby
from pathlib import Path
from typing import ClassVar

from bridgework.config import config_class
from bridgework.curation import llm, talk
from bridgework.curation.llm import Message
from bridgework.curation.runner import Annotator, Decision, Fact, Rows, bad
from bridgework.data.images import decode
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError, SpecError, suggest

TRIES = 2
DESCRIBE = (  # the question before a description, which is drawn
    "Describe this image in detail.",
    "What does this picture show? Tell me everything you can see.",
    "Give me a full account of this image.",
    "Can you describe the scene for somebody who cannot see it?",
    "Walk me through this picture: what is there, and where?",
    "Write a detailed description of what is shown here.",
)


@config_class
class Instruct:
    """Who writes, what is written, and how it is drawn."""

    endpoint: str | None = None  # its base URL, up to /v1
    model: str | None = None  # as the endpoint calls it
    key: str = "OPENAI_API_KEY"  # the environment variable that holds the endpoint's key
    lm: str | None = None  # instead: a folder of transformers' form, or an artifact's
    kinds: tuple[str, ...] = ("conversation", "detail", "reasoning")
    show: bool = False  # the endpoint sees the picture as well, which LLaVA's did not
    temperature: float = 0.7
    max_tokens: int = 1024  # of an answer
    seed: int = 0
    parallel: int = 8  # requests under way
    timeout_s: float = 120.0

    drawn: ClassVar[tuple[str, ...]] = (
        "endpoint",
        "model",
        "kinds",
        "show",
        "temperature",
        "max_tokens",
        "seed",
    )

    def __post_init__(self) -> None:
        if (self.endpoint is None) == (self.lm is None) or (self.endpoint is None) != (
            self.model is None
        ):
            raise SpecError("instruct: give endpoint=URL and model=NAME, or lm=FOLDER")
        if self.show and self.endpoint is None:
            raise SpecError(
                "instruct: show=true sends the picture to an endpoint; an lm reads texts alone"
            )
        if unknown := [kind for kind in self.kinds if kind not in talk.KINDS]:
            raise SpecError(
                f"instruct: there is no kind {unknown[0]!r}" + suggest(unknown[0], talk.KINDS)
            )
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise SpecError(
                f"instruct: kinds names at least one, and each once; got {', '.join(self.kinds) or 'none'}"
            )
        if self.temperature < 0 or self.max_tokens < 1 or self.parallel < 1 or self.timeout_s <= 0:
            given = (
                f"{self.temperature:g}, {self.max_tokens}, {self.parallel} and {self.timeout_s:g}"
            )
            raise SpecError(
                f"instruct: temperature is at least 0, max_tokens and parallel 1, timeout_s above 0; got {given}"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        texts = "".join(_text(kind) for kind in self.kinds)
        told = {"prompts": hashlib.sha256(texts.encode()).hexdigest()}
        return told if self.lm is None else told | {"lm": llm.digest(self.lm)}

    def judge(self, home: Path) -> Annotator:
        """Asks; tells the picture's digest and, of the first row of a picture, the answers as they came."""
        return _Judge(self, self._writer())

    def _writer(self) -> llm.ChatModel:
        if self.endpoint is None or self.model is None:
            return llm.LocalChatModel(
                self.lm or "", temperature=self.temperature, max_tokens=self.max_tokens
            )
        return llm.ChatEndpoint(
            self.endpoint,
            self.model,
            key=self.key,
            timeout_s=self.timeout_s,
            parallel=self.parallel,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
        )

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """A sample for every kind whose answer, the first or the second, reads as it should."""
        before = None
        for sample, fact in rows():
            same, before = fact["image"] == before, fact["image"]
            yield (
                Decision("asked about with the row before it")
                if same
                else self._verdict(sample, fact)
            )

    def _verdict(self, sample: Sample, fact: Fact) -> Decision:
        made: list[Sample] = []
        faults: dict[str, str] = {}
        for kind, answers in fact["answers"].items():
            for number, raw in enumerate(answers, 1):
                try:
                    made.append(
                        self._sample(sample, kind, talk.read(raw, kind), fact["captions"], number)
                    )
                    faults.pop(kind, None)
                    break
                except DataError as error:
                    faults[kind] = str(error)
        if not made:
            return Decision(
                f"no answer to use: {next(iter(faults.values()), 'no caption to write from')}"
            )
        note = ", ".join(f"{kind}: {fault}" for kind, fault in faults.items())
        return Decision("kept, not of every kind" if faults else "kept", tuple(made), note)

    def _sample(
        self, sample: Sample, kind: str, turns: Sequence[talk.Turn], captions: int, number: int
    ) -> Sample:
        draws = random.Random(f"{self.seed}/{kind}/{sample.key}")
        image, last = (
            Part("user", image=0),
            draws.random() < 0.5,
        )  # the image before or behind the question (eq. 2)
        parts: list[Part] = []
        for question, answer in turns:
            asked = question or draws.choice(DESCRIBE)
            if parts:
                parts.append(Part("user", text=asked))
            else:
                parts += (
                    [Part("user", text=asked + "\n"), image]
                    if last
                    else [image, Part("user", text="\n" + asked)]
                )
            parts.append(Part("assistant", text=answer))
        told = {
            "kind": kind,
            "captions": str(captions),
            "answer": str(number),
            "model": self.model or "",
        }
        provenance = {
            **sample.provenance,
            **{f"instruct.{name}": value for name, value in told.items()},
        }
        return replace(
            sample,
            key=f"{sample.key}/{kind}",
            parts=tuple(parts),
            language=None,
            provenance=provenance,
        )


class _Judge:
    """Holds the writer."""

    def __init__(self, spec: Instruct, writer: llm.ChatModel) -> None:
        self._spec, self._writer = spec, writer

    def __call__(self, samples: Sequence[Sample]) -> list[Fact]:
        pictures = [list(rows) for _, rows in groupby(samples, key=lambda sample: sample.images)]
        wrong = [_wrong(rows[0]) for rows in pictures]
        asked = [n for n, rows in enumerate(pictures) if wrong[n] is None and _captions(rows)]
        jobs = [(number, kind) for number in asked for kind in self._spec.kinds]
        answers = llm.side_by_side(
            self._writer, lambda job: self._ask(pictures[job[0]], job[1]), jobs
        )
        told = dict(zip(jobs, answers, strict=True))
        facts: list[Fact] = []
        for number, (rows, error) in enumerate(zip(pictures, wrong, strict=True)):
            if error is not None:
                facts += [bad(error)] * len(rows)
                continue
            image = {"image": hashlib.sha256(rows[0].images[0]).hexdigest()[:24]}
            own = {kind: told[number, kind] for kind in self._spec.kinds if (number, kind) in told}
            facts += [
                image | {"captions": len(_captions(rows)), "answers": own},
                *[image] * (len(rows) - 1),
            ]
        return facts

    def _ask(self, rows: Sequence[Sample], kind: str) -> list[str]:
        """Up to TRIES answers; the last is the first that reads as it should, if any does."""
        messages, answers = self._messages(rows, kind), list[str]()
        for number in range(TRIES):
            answers.append(
                self._writer(messages, llm.drawn(self._spec.seed, rows[0].key, kind, number))
            )
            with suppress(DataError):
                talk.read(answers[-1], kind)
                break
        return answers

    def _messages(self, rows: Sequence[Sample], kind: str) -> list[Message]:
        system, *examples = re.split(r"^=== (?:picture|answer)\n", _text(kind), flags=re.MULTILINE)
        known = "\n".join(_captions(rows) + (_things(rows) if kind != "conversation" else []))
        said = zip(
            cycle(("user", "assistant")),
            [*(text.strip() for text in examples), known],
            strict=False,
        )
        messages: list[Message] = [{"role": "system", "content": system.strip()}]
        messages += [{"role": role, "content": text} for role, text in said]
        if self._spec.show:
            messages[-1]["content"] = [
                {"type": "text", "text": known},
                llm.picture(rows[0].images[0]),
            ]
        return messages


def _wrong(sample: Sample) -> BadSample | None:
    if len(sample.images) != 1:
        return BadSample(Reason.BAD_ROW, "instruct reads one image and its captions a row")
    try:
        decode(sample.images[0])
    except BadSample as error:
        return error
    return None


def _captions(rows: Sequence[Sample]) -> list[str]:
    """What the rows of a picture say of it, a line each, each once."""
    texts = [
        part.text
        for row in rows
        for part in row.parts
        if part.role == "caption" and part.text is not None
    ]
    return list(dict.fromkeys(filter(None, (" ".join(text.split()) for text in texts))))


def _things(rows: Sequence[Sample]) -> list[str]:
    """The boxes of the rows of a picture, each once, on one line."""
    boxes = dict.fromkeys((box.label, box.corners) for row in rows for box in row.boxes)
    told = [
        f"{label} [{', '.join(f'{share:.2f}' for share in corners)}]" for label, corners in boxes
    ]
    return [f"things: {'; '.join(told)}"] if told else []


@cache
def _text(kind: str) -> str:
    """The prompt of a kind: what the writer is told, then `=== picture` and `=== answer` in turn."""
    return (Path(__file__).parent / "prompts" / f"{kind}.txt").read_text(encoding="utf-8")
