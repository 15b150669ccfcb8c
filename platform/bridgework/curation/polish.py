"""MiniGPT-4's second-stage data (arXiv:2304.10592, 3.2): long descriptions, written, mended and checked.

With a `model` every image is described; a description of fewer than 80 tokens is continued, once. Without one, the
rows' own texts are mended. Rules remove what such models leave behind: words and sentences that repeat themselves,
sentences that break off, other languages, scaffolding and apologies. An OpenAI-compatible `endpoint` may rewrite what
is left, as ChatGPT did for the paper, and the rules go over it again. What is too short or not English then is dropped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bridgework.config import config_class
from bridgework.curation import llm
from bridgework.curation.mending import clean, wrong
from bridgework.curation.runner import Annotator, Decision, Fact, Model, Rows, bad
from bridgework.data.images import decode
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.errors import SpecError

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

PROMPT = "Describe this image in detail. Name everything that you can see, and leave nothing out."
CONTINUE = "Continue"  # 3.2
REWRITE = (
    "Correct the description of a picture below. Take out what is said twice, marks without a meaning, sentences that "
    "are not English and sentences that are not complete; mend the grammar and change nothing else. Answer with the "
    "corrected description alone, and with the description as it is if there is nothing to correct.\n\n"
)


@config_class
class Polish:
    """Who describes and who rewrites, how it is drawn, and what is long enough."""

    model: Model | None = (
        None  # describes the images; without one, the rows' captions or answers are mended
    )
    template: str | None = (
        "human"  # that it is asked in, though it was aligned without one; none: its own
    )
    prompt: str = PROMPT
    enough: int = 80  # tokens; a shorter description is continued (3.2)
    max_tokens: int = 300  # the authors' release
    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0
    endpoint: str | None = None  # its base URL, up to /v1
    rewriter: str | None = None  # the model that rewrites, as the endpoint calls it
    key: str = "OPENAI_API_KEY"  # the environment variable that holds the endpoint's key
    parallel: int = 8  # requests under way
    min_words: int = 20  # of what goes on

    drawn: ClassVar[tuple[str, ...]] = (
        "template", "prompt", "enough", "max_tokens", "temperature", "top_p", "seed", "endpoint", "rewriter",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if (self.endpoint is None) != (self.rewriter is None):
            raise SpecError("polish: endpoint=URL goes with rewriter=NAME; give both, or neither")
        if not 0 < self.top_p <= 1 or self.temperature < 0:
            drawn = f"{self.top_p:g} and {self.temperature:g}"
            raise SpecError(
                f"polish: top_p lies in (0, 1] and temperature is at least 0; got {drawn}"
            )
        if min(self.max_tokens, self.parallel, self.min_words) < 1 or self.enough < 0:
            raise SpecError(
                "polish: max_tokens, parallel and min_words are at least 1, and enough is at least 0"
            )
        if not self.prompt.strip():
            raise SpecError("polish: the prompt is empty; leave it out to take the one that ships")

    def models(self, home: Path) -> Mapping[str, str]:
        if self.model is None:
            return {}
        from bridgework import artifacts

        return {"model": artifacts.describe(self.model).digest}

    def judge(self, home: Path) -> Annotator:
        """Tells the description, whether it was continued, and what the endpoint made of it."""
        return _Judge(self)

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """A pair for every row whose text, mended, is long enough and English."""
        for sample, fact in rows():
            text = fact["rewritten"] or fact["written"]
            mended = clean(text)
            if (fault := wrong(mended, self.min_words)) is not None:
                yield Decision(fault, note=mended or text)
                continue
            told = {"polish.continued": "once"} if fact["continued"] else {}
            why = "kept" if mended == fact["written"] else "kept, mended"
            yield Decision(why, (_pair(sample, mended, told),), mended)


class _Judge:
    """Holds the model and the client of the endpoint."""

    def __init__(self, spec: Polish) -> None:
        self._spec = spec
        self._model = None if spec.model is None else _asked_in(spec.template, spec.model)
        self._rewriter = None
        if spec.endpoint is not None and spec.rewriter is not None:
            how: Any = {
                "key": spec.key,
                "parallel": spec.parallel,
                "max_tokens": 2 * spec.max_tokens,
            }
            self._rewriter = llm.ChatEndpoint(spec.endpoint, spec.rewriter, **how)

    def __call__(self, samples: Sequence[Sample]) -> list[Fact]:
        own = [_own(sample, needed=self._model is None) for sample in samples]
        good = [
            (s, text)
            for s, text in zip(samples, own, strict=True)
            if not isinstance(text, BadSample)
        ]
        told = iter(
            self._told([sample for sample, _ in good], [text for _, text in good]) if good else ()
        )
        return [bad(text) if isinstance(text, BadSample) else next(told) for text in own]

    def _told(self, samples: Sequence[Sample], own: Sequence[str]) -> list[Fact]:
        written = (
            [(text, False) for text in own]
            if self._model is None
            else self._described(self._model, samples)
        )
        rewritten: Sequence[str] = [""] * len(written)
        if self._rewriter is not None:
            asked = [
                (sample.key, clean(text))
                for sample, (text, _) in zip(samples, written, strict=True)
            ]
            rewritten = llm.side_by_side(self._rewriter, self._rewrite, asked)
        return [
            {"written": text, "continued": continued, "rewritten": new}
            for (text, continued), new in zip(written, rewritten, strict=True)
        ]

    def _described(self, model: "Pipeline", samples: Sequence[Sample]) -> list[tuple[str, bool]]:
        """(description, whether it was continued), for each."""
        first = [
            [Part("user", image=0), Part("user", text="\n" + self._spec.prompt)] for _ in samples
        ]
        texts = self._write(model, samples, first, 0)
        short = [at for at, text in enumerate(texts) if _tokens(model, text) < self._spec.enough]
        longer = [
            [*first[at], Part("assistant", text=texts[at]), Part("user", text=CONTINUE)]
            for at in short
        ]
        more = self._write(model, [samples[at] for at in short], longer, 1) if short else []
        added = dict(zip(short, more, strict=True))
        return [
            (f"{text} {added[at]}".strip() if at in added else text, at in added)
            for at, text in enumerate(texts)
        ]

    def _write(
        self,
        model: "Pipeline",
        samples: Sequence[Sample],
        asked: Sequence[Sequence[Part]],
        number: int,
    ) -> list[str]:
        spec = self._spec
        how: Any = {
            "max_new_tokens": spec.max_tokens,
            "temperature": spec.temperature,
            "top_p": spec.top_p,
        }
        seeds = [llm.drawn(spec.seed, sample.key, number) for sample in samples]
        return model.generate_batch(asked, [[sample.images[0]] for sample in samples], seeds, **how)

    def _rewrite(self, asked: tuple[str, str]) -> str:
        key, text = asked
        if self._rewriter is None or not text:
            return ""
        return self._rewriter(
            [{"role": "user", "content": REWRITE + text}], llm.drawn(self._spec.seed, key)
        )


def _asked_in(template: str | None, folder: str) -> "Pipeline":
    """The model, spoken to in a template that need not be the one of its training."""
    from bridgework.inference.pipeline import Pipeline

    loaded = Pipeline.load(folder)
    if template is None:
        return loaded
    stage = loaded.stage
    return Pipeline(loaded.model, replace(stage, data=replace(stage.data, template=template)))


def _tokens(model: "Pipeline", text: str) -> int:
    from bridgework.data.tokenization import tokenize

    return len(tokenize(text, model.tokenizer, literal=True))


def _own(sample: Sample, *, needed: bool) -> str | BadSample:
    """The text of a row of one image, or what is wrong with it."""
    texts = [
        part.text
        for part in sample.parts
        if part.role in ("caption", "assistant") and part.text is not None
    ]
    if len(sample.images) != 1 or (needed and len(texts) != 1):
        return BadSample(
            Reason.BAD_ROW,
            "polish reads one image a row and, without a model, its one caption or answer",
        )
    try:
        decode(sample.images[0])
    except BadSample as error:
        return error
    return texts[0] if needed else ""


def _pair(sample: Sample, text: str, told: Mapping[str, str]) -> Sample:
    return replace(
        sample,
        parts=(Part("caption", image=0), Part("caption", text=text)),
        rejected=None,
        language="en",
        provenance={**sample.provenance, **told},
    )
