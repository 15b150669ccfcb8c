"""Instruction data from captions and boxes (LLaVA, arXiv:2304.08485, 3).

The kinds are conversation, detail and complex reasoning. A text-only language model generates the
data from a prompt with two examples per kind (`prompts/`, our own text): an OpenAI-compatible
endpoint (`endpoint`, `model`) or a local model (`lm`). An answer that cannot be parsed, or refers
to the captions, is requested once again and then dropped. Annotations hold the raw answers, so
deciding again sends no request.

Neighboring rows of a row group with the same image bytes, e.g. COCO's five captions, are sent in
one request. If an image is in two row groups, it is requested twice, and the first answers are
kept.
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
from bridgework.curation import llm
from bridgework.curation.conversation_parser import KINDS, Turn, parse
from bridgework.curation.llm import Message
from bridgework.curation.runner import Annotation, Annotator, Decision, Rows, bad
from bridgework.data.images import decode
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError, SpecError, suggest

TRIES = 2
DESCRIBE = (  # questions for descriptions, one is drawn per row
    "Describe this image in detail.",
    "What does this picture show? Tell me everything you can see.",
    "Give me a full account of this image.",
    "Can you describe the scene for somebody who cannot see it?",
    "Walk me through this picture: what is there, and where?",
    "Write a detailed description of what is shown here.",
)


@config_class
class Instruct:
    """Generating model, kinds of data and sampling options."""

    endpoint: str | None = None  # base URL, up to /v1
    model: str | None = None  # name of the model at the endpoint
    key: str = "OPENAI_API_KEY"  # environment variable with the endpoint's API key
    lm: str | None = None  # instead of an endpoint: folder of a transformers model or an artifact
    kinds: tuple[str, ...] = ("conversation", "detail", "reasoning")
    show: bool = False  # send the image as well, unlike LLaVA
    temperature: float = 0.7
    max_tokens: int = 1024  # of an answer
    seed: int = 0
    parallel: int = 8  # concurrent requests
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
                "instruct: show=true sends the image to an endpoint, but an lm reads text only. "
                "Fix: set endpoint and model, or leave out show"
            )
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise SpecError(
                f"instruct: there is no kind {unknown[0]!r}" + suggest(unknown[0], KINDS)
            )
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise SpecError(
                f"instruct: kinds are one or more, each once. Got {', '.join(self.kinds) or 'none'}"
            )
        if self.temperature < 0 or self.max_tokens < 1 or self.parallel < 1 or self.timeout_s <= 0:
            raise SpecError(
                "instruct: temperature is at least 0, max_tokens and parallel are at least 1, "
                "and timeout_s is above 0. "
                f"Got {self.temperature:g}, {self.max_tokens}, {self.parallel} and "
                f"{self.timeout_s:g}"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        """Return the digests of the prompts and of the local model."""
        texts = "".join(_prompt(kind) for kind in self.kinds)
        digests = {"prompts": hashlib.sha256(texts.encode()).hexdigest()}
        return digests if self.lm is None else digests | {"lm": llm.digest(self.lm)}

    def judge(self, home: Path) -> Annotator:
        """Build the annotator: image digest, and on the first row of an image the raw answers."""
        return _InstructAnnotator(self, self._chat_model())

    def _chat_model(self) -> llm.ChatModel:
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
        """Write one sample per kind whose first or second answer can be parsed."""
        before = None
        for sample, annotation in rows():
            same, before = annotation["image"] == before, annotation["image"]
            if same:
                yield Decision("asked about with the row before it")
            else:
                yield self._decision(sample, annotation)

    def _decision(self, sample: Sample, annotation: Annotation) -> Decision:
        new: list[Sample] = []
        faults: dict[str, str] = {}
        for kind, answers in annotation["answers"].items():
            for number, raw in enumerate(answers, 1):
                try:
                    turns = parse(raw, kind)
                except DataError as error:
                    faults[kind] = str(error)
                    continue
                new.append(self._sample(sample, kind, turns, annotation["captions"], number))
                faults.pop(kind, None)
                break
        if not new:
            fault = next(iter(faults.values()), "no caption to write from")
            return Decision(f"no answer to use: {fault}")
        note = ", ".join(f"{kind}: {fault}" for kind, fault in faults.items())
        return Decision("kept, not of every kind" if faults else "kept", tuple(new), note)

    def _sample(
        self, sample: Sample, kind: str, turns: Sequence[Turn], captions: int, number: int
    ) -> Sample:
        draws = random.Random(f"{self.seed}/{kind}/{sample.key}")
        image = Part("user", image=0)
        image_last = draws.random() < 0.5  # image before or after the question (eq. 2)
        parts: list[Part] = []
        for question, answer in turns:
            text = question or draws.choice(DESCRIBE)
            if parts:
                parts.append(Part("user", text=text))
            elif image_last:
                parts += [Part("user", text=text + "\n"), image]
            else:
                parts += [image, Part("user", text="\n" + text)]
            parts.append(Part("assistant", text=answer))
        stamp = {
            "instruct.kind": kind,
            "instruct.captions": str(captions),
            "instruct.answer": str(number),
            "instruct.model": self.model or "",
        }
        return replace(
            sample,
            key=f"{sample.key}/{kind}",
            parts=tuple(parts),
            language=None,
            provenance={**sample.provenance, **stamp},
        )


class _InstructAnnotator:
    """Sends the requests for every image of a row group."""

    def __init__(self, spec: Instruct, model: llm.ChatModel) -> None:
        self._spec, self._model = spec, model

    def __call__(self, samples: Sequence[Sample]) -> list[Annotation]:
        images = [list(rows) for _, rows in groupby(samples, key=lambda sample: sample.images)]
        errors = [_find_error(rows[0]) for rows in images]
        usable = [n for n, rows in enumerate(images) if errors[n] is None and _captions(rows)]
        requests = [(number, kind) for number in usable for kind in self._spec.kinds]
        replies = llm.map_parallel(
            self._model, lambda request: self._ask(images[request[0]], request[1]), requests
        )
        by_request = dict(zip(requests, replies, strict=True))
        annotations: list[Annotation] = []
        for number, (rows, error) in enumerate(zip(images, errors, strict=True)):
            if error is not None:
                annotations += [bad(error)] * len(rows)
                continue
            image = {"image": hashlib.sha256(rows[0].images[0]).hexdigest()[:24]}
            answers = {
                kind: by_request[number, kind]
                for kind in self._spec.kinds
                if (number, kind) in by_request
            }
            annotations += [
                image | {"captions": len(_captions(rows)), "answers": answers},
                *[image] * (len(rows) - 1),
            ]
        return annotations

    def _ask(self, rows: Sequence[Sample], kind: str) -> list[str]:
        """Return up to TRIES answers, and stop at the first that can be parsed."""
        messages, answers = self._messages(rows, kind), list[str]()
        for number in range(TRIES):
            seed = llm.seed_of(self._spec.seed, rows[0].key, kind, number)
            answers.append(self._model(messages, seed))
            with suppress(DataError):
                parse(answers[-1], kind)
                break
        return answers

    def _messages(self, rows: Sequence[Sample], kind: str) -> list[Message]:
        sections = re.split(r"^=== (?:picture|answer)\n", _prompt(kind), flags=re.MULTILINE)
        system, *examples = (section.strip() for section in sections)
        source = "\n".join(_captions(rows) + (_boxes(rows) if kind != "conversation" else []))
        turns = zip(cycle(("user", "assistant")), [*examples, source], strict=False)
        messages: list[Message] = [{"role": "system", "content": system}]
        messages += [{"role": role, "content": text} for role, text in turns]
        if self._spec.show:
            messages[-1]["content"] = [
                {"type": "text", "text": source},
                llm.image_part(rows[0].images[0]),
            ]
        return messages


def _find_error(sample: Sample) -> BadSample | None:
    if len(sample.images) != 1:
        return BadSample(Reason.BAD_ROW, "instruct reads one image and its captions a row")
    try:
        decode(sample.images[0])
    except BadSample as error:
        return error
    return None


def _captions(rows: Sequence[Sample]) -> list[str]:
    """Return the captions of an image's rows, one line each, without repetitions."""
    texts = [
        part.text
        for row in rows
        for part in row.parts
        if part.role == "caption" and part.text is not None
    ]
    return list(dict.fromkeys(filter(None, (" ".join(text.split()) for text in texts))))


def _boxes(rows: Sequence[Sample]) -> list[str]:
    """Return one line with the boxes of an image's rows, without repetitions."""
    boxes = dict.fromkeys((box.label, box.corners) for row in rows for box in row.boxes)
    texts = [
        f"{label} [{', '.join(f'{share:.2f}' for share in corners)}]" for label, corners in boxes
    ]
    return [f"things: {'; '.join(texts)}"] if texts else []


@cache
def _prompt(kind: str) -> str:
    """Return the prompt of a kind: instructions, then `=== picture` and `=== answer` in turn."""
    return (Path(__file__).parent / "prompts" / f"{kind}.txt").read_text(encoding="utf-8")
