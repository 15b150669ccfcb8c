"""MiniGPT-4's second-stage data (arXiv:2304.10592, 3.2): long descriptions, generated and cleaned.

With a `model`, every image is described; a description of fewer than 80 tokens is continued once.
Without a model, the rows' own texts are cleaned. Rules remove typical faults of generated text:
repeated words and sentences, incomplete sentences, other languages, scaffolding and apologies. An
OpenAI-compatible `endpoint` can rewrite the result, as ChatGPT did for the paper; then the rules
are applied again. Texts that are too short or not English are dropped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bridgework.config import config_class
from bridgework.curation import llm
from bridgework.curation.runner import Annotation, Annotator, Decision, Model, Rows, bad
from bridgework.curation.text_cleaning import clean, find_fault
from bridgework.data.images import decode
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.errors import SpecError

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

PROMPT = "Describe this image in detail. Name everything that you can see, and leave nothing out."
CONTINUE = "Continue"  # 3.2
REWRITE = (
    "Correct the description of a picture below. Take out what is said twice, marks without a "
    "meaning, sentences that are not English and sentences that are not complete; mend the grammar "
    "and change nothing else. Answer with the corrected description alone, and with the description "
    "as it is if there is nothing to correct.\n\n"
)


@config_class
class Polish:
    """Describing model, rewriting endpoint, sampling options and minimum length."""

    model: Model | None = None  # describes the images; None: clean the captions or answers
    template: str | None = "human"  # of the prompts; none: the model's own template
    prompt: str = PROMPT
    enough: int = 80  # tokens; a shorter description is continued (3.2)
    max_tokens: int = 300  # as in the authors' release
    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0
    endpoint: str | None = None  # base URL, up to /v1
    rewriter: str | None = None  # name of the rewriting model at the endpoint
    key: str = "OPENAI_API_KEY"  # environment variable with the endpoint's API key
    parallel: int = 8  # concurrent requests
    min_words: int = 20  # of a kept text

    drawn: ClassVar[tuple[str, ...]] = (
        "template", "prompt", "enough", "max_tokens", "temperature", "top_p", "seed", "endpoint",
        "rewriter",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if (self.endpoint is None) != (self.rewriter is None):
            raise SpecError(
                "polish: endpoint=URL goes with rewriter=NAME. Fix: give both, or neither"
            )
        if not 0 < self.top_p <= 1 or self.temperature < 0:
            raise SpecError(
                "polish: top_p is in (0, 1] and temperature is at least 0. "
                f"Got {self.top_p:g} and {self.temperature:g}"
            )
        if min(self.max_tokens, self.parallel, self.min_words) < 1 or self.enough < 0:
            raise SpecError(
                "polish: max_tokens, parallel and min_words are at least 1, enough at least 0. "
                f"Got {self.max_tokens}, {self.parallel}, {self.min_words} and {self.enough}"
            )
        if not self.prompt.strip():
            raise SpecError("polish: the prompt is empty. Fix: leave it out to use the default")

    def models(self, home: Path) -> Mapping[str, str]:
        """Return the digest of the describing model.

        Raises WeightsError if it is not an artifact.
        """
        if self.model is None:
            return {}
        from bridgework import artifacts

        return {"model": artifacts.describe(self.model).digest}

    def judge(self, home: Path) -> Annotator:
        """Build the annotator: description, whether it was continued, and the rewritten text."""
        return _PolishAnnotator(self)

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Keep a pair of every row whose cleaned text is long enough and English."""
        for sample, annotation in rows():
            text = annotation["rewritten"] or annotation["written"]
            cleaned = clean(text)
            if (fault := find_fault(cleaned, self.min_words)) is not None:
                yield Decision(fault, note=cleaned or text)
                continue
            stamp = {"polish.continued": "once"} if annotation["continued"] else {}
            why = "kept" if cleaned == annotation["written"] else "kept, mended"
            yield Decision(why, (_pair(sample, cleaned, stamp),), cleaned)


class _PolishAnnotator:
    """Describes images, or takes their texts, and lets the endpoint rewrite them."""

    def __init__(self, spec: Polish) -> None:
        self._spec = spec
        self._model = None if spec.model is None else _load(spec.model, spec.template)
        self._rewriter = None
        if spec.endpoint is not None and spec.rewriter is not None:
            self._rewriter = llm.ChatEndpoint(
                spec.endpoint,
                spec.rewriter,
                key=spec.key,
                parallel=spec.parallel,
                max_tokens=2 * spec.max_tokens,
            )

    def __call__(self, samples: Sequence[Sample]) -> list[Annotation]:
        texts = [_text_of(sample, required=self._model is None) for sample in samples]
        usable = [
            (sample, text)
            for sample, text in zip(samples, texts, strict=True)
            if not isinstance(text, BadSample)
        ]
        new = iter(self._annotate([s for s, _ in usable], [t for _, t in usable]) if usable else ())
        return [bad(text) if isinstance(text, BadSample) else next(new) for text in texts]

    def _annotate(self, samples: Sequence[Sample], texts: Sequence[str]) -> list[Annotation]:
        written = [(text, False) for text in texts]
        if self._model is not None:
            written = self._describe(self._model, samples)
        rewritten: Sequence[str] = [""] * len(written)
        if self._rewriter is not None:
            keyed = [
                (sample.key, clean(text))
                for sample, (text, _) in zip(samples, written, strict=True)
            ]
            rewritten = llm.map_parallel(self._rewriter, self._rewrite, keyed)
        return [
            {"written": text, "continued": continued, "rewritten": new}
            for (text, continued), new in zip(written, rewritten, strict=True)
        ]

    def _describe(self, model: "Pipeline", samples: Sequence[Sample]) -> list[tuple[str, bool]]:
        """Return (description, True if it was continued) of each image."""
        first = [
            [Part("user", image=0), Part("user", text="\n" + self._spec.prompt)] for _ in samples
        ]
        texts = self._generate(model, samples, first, 0)
        short = [at for at, text in enumerate(texts) if _tokens(model, text) < self._spec.enough]
        longer = [
            [*first[at], Part("assistant", text=texts[at]), Part("user", text=CONTINUE)]
            for at in short
        ]
        more = self._generate(model, [samples[at] for at in short], longer, 1) if short else []
        added = dict(zip(short, more, strict=True))
        return [
            (f"{text} {added[at]}".strip() if at in added else text, at in added)
            for at, text in enumerate(texts)
        ]

    def _generate(
        self,
        model: "Pipeline",
        samples: Sequence[Sample],
        conversations: Sequence[Sequence[Part]],
        turn: int,
    ) -> list[str]:
        spec = self._spec
        return model.generate_batch(
            conversations,
            [[sample.images[0]] for sample in samples],
            [llm.seed_of(spec.seed, sample.key, turn) for sample in samples],
            max_new_tokens=spec.max_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
        )

    def _rewrite(self, keyed: tuple[str, str]) -> str:
        key, text = keyed
        if self._rewriter is None or not text:
            return ""
        return self._rewriter(
            [{"role": "user", "content": REWRITE + text}], llm.seed_of(self._spec.seed, key)
        )


def _load(folder: str, template: str | None) -> "Pipeline":
    """Load a model with another prompt template than that of its training."""
    from bridgework.inference.pipeline import Pipeline

    loaded = Pipeline.load(folder)
    if template is None:
        return loaded
    stage = loaded.stage
    return Pipeline(loaded.model, replace(stage, data=replace(stage.data, template=template)))


def _tokens(model: "Pipeline", text: str) -> int:
    from bridgework.data.tokenization import tokenize

    return len(tokenize(text, model.tokenizer, literal=True))


def _text_of(sample: Sample, *, required: bool) -> str | BadSample:
    """Return the text of a row of one image, or the reason to quarantine the row."""
    texts = [
        part.text
        for part in sample.parts
        if part.role in ("caption", "assistant") and part.text is not None
    ]
    if len(sample.images) != 1 or (required and len(texts) != 1):
        return BadSample(
            Reason.BAD_ROW,
            "polish reads one image a row and, without a model, its one caption or answer",
        )
    try:
        decode(sample.images[0])
    except BadSample as error:
        return error
    return texts[0] if required else ""


def _pair(sample: Sample, text: str, stamp: Mapping[str, str]) -> Sample:
    return replace(
        sample,
        parts=(Part("caption", image=0), Part("caption", text=text)),
        rejected=None,
        language="en",
        provenance={**sample.provenance, **stamp},
    )
