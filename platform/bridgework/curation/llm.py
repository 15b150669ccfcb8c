"""Who writes texts from texts: any OpenAI-compatible endpoint, or a language model on this machine.

Both take the messages of a chat, {"role", "content"} each, and give one answer; a seed draws the same answer again
where the writer can.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bridgework.data.samples import Part
from bridgework.errors import RunError, SpecError, WeightsError

Message = dict[str, Any]
Item = TypeVar("Item")
Made = TypeVar("Made")

ATTEMPTS = 8  # with their waits, half a minute
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 30.0
SHOWN = 200  # characters of what an endpoint answered, in an error
MIME = {
    b"\xff\xd8": "jpeg",
    b"\x89P": "png",
    b"RI": "webp",
    b"GI": "gif",
    b"BM": "bmp",
}  # by a file's first bytes
WEIGHTS = ("*.safetensors", "config.json", "tokenizer.json")


class ChatModel(Protocol):
    """Answers a chat; several threads may ask where `parallel` is above 1."""

    parallel: int

    def __call__(self, messages: Sequence[Message], seed: int) -> str:
        """The answer, without blanks around it; empty where there is none."""


class ChatEndpoint:
    """A model behind a URL that speaks the chat-completions form."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "OPENAI_API_KEY",
        temperature: float = 0.0,
        max_tokens: int = 1024,
        timeout_s: float = 120.0,
        parallel: int = 8,
        attempts: int = ATTEMPTS,
    ) -> None:
        """`key` is the environment variable that holds the key; an endpoint without keys needs none."""
        from openai import OpenAI  # a second, which nothing else pays

        self.parallel = parallel
        self._url, self._key, self._attempts = url, key, attempts
        self._how = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._client = OpenAI(
            base_url=url, api_key=os.environ.get(key) or "none", max_retries=0, timeout=timeout_s
        )  # tenacity tries again

    def __call__(self, messages: Sequence[Message], seed: int) -> str:
        """A request that the endpoint refuses for what it says (400, 422) has no answer.

        Raises RunError where it does not let us in, and where it still gives no chat completion after several tries.
        """
        import openai
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

        busy = (
            openai.APIConnectionError,
            openai.RateLimitError,
            openai.InternalServerError,
            openai.ConflictError,
        )
        tries = Retrying(
            retry=retry_if_exception_type((*busy, RunError)),
            wait=wait_exponential(FIRST_WAIT_S, LONGEST_WAIT_S, min=FIRST_WAIT_S),
            stop=stop_after_attempt(self._attempts),
            reraise=True,
        )
        try:
            return tries(self._ask, messages, seed)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            return ""
        except openai.OpenAIError as error:
            raise self._lost("does not answer", str(error)) from None

    def _ask(self, messages: Sequence[Message], seed: int) -> str:
        """Raises RunError for an answer that is no chat completion, and what openai raises."""
        asked: Any = {**self._how, "messages": list(messages), "seed": seed}
        body = self._client.chat.completions.with_raw_response.create(**asked).text
        try:
            return said(body)
        except (ValueError, RecursionError):  # the latter: brackets without end
            raise self._lost("answers with no chat completion", body) from None

    def _lost(self, how: str, told: str) -> RunError:
        shown = " ".join(told.split())[:SHOWN] or "nothing at all"
        return RunError(
            f"{self._url} {how}: {shown}; see to the URL (up to /v1), the model's name and the key in ${self._key}, "
            "then run again: what was answered before is kept, row group by row group"
        )


def said(body: str) -> str:
    """The text of a chat completion, as JSON; empty where it has none. Raises ValueError for any other body."""
    match json.loads(body):
        case {"choices": [{"message": ({"role": _} | {"content": _}) as message}, *_]}:
            text = _text(message.get("content")).strip()
            return text.encode(errors="replace").decode()  # half a surrogate pair is no text
    raise ValueError("no chat completion")


def _text(content: Any) -> str:
    """Of a message: its words, those of its parts that are text, or none. Raises ValueError for anything else."""
    match content:
        case None:
            return ""
        case str():
            return content
        case [*parts] if all(isinstance(part, dict) for part in parts):
            return "".join(
                str(part.get("text") or "") for part in parts if part.get("type") == "text"
            )
    raise ValueError("no content of a message")


class LocalChatModel:
    """A language model in a folder: an artifact of a stage that answers, or a causal model of transformers."""

    parallel = 1  # a model holds one stream of draws

    def __init__(self, folder: str, *, temperature: float = 0.0, max_tokens: int = 1024) -> None:
        """Raises WeightsError for what is no model, SpecError for one without a chat template."""
        self._temperature, self._max_tokens = temperature, max_tokens
        self._answer = self._artifact(folder) if _is_artifact(folder) else self._transformer(folder)

    def __call__(self, messages: Sequence[Message], seed: int) -> str:
        return self._answer(messages, seed).strip()

    def _artifact(self, folder: str) -> Callable[[Sequence[Message], int], str]:
        from bridgework.inference.pipeline import Pipeline

        pipeline = Pipeline.load(folder)

        def answer(messages: Sequence[Message], seed: int) -> str:
            parts = [Part(message["role"], text=message["content"]) for message in messages]
            how: Any = {"temperature": self._temperature, "max_new_tokens": self._max_tokens}
            return pipeline.generate_batch([parts], [[]], [seed], **how)[0]

        return answer

    def _transformer(self, folder: str) -> Callable[[Sequence[Message], int], str]:
        import torch
        from transformers import AutoModelForCausalLM

        from bridgework.data.templates import chat_text
        from bridgework.data.tokenization import load_tokenizer
        from bridgework.models import pretrained

        tokenizer = load_tokenizer(folder)
        if tokenizer.chat_template is None:
            raise SpecError(
                f"the tokenizer of {folder} has no chat template, so it cannot be asked; take a chat model"
            )
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = pretrained.load(AutoModelForCausalLM, folder).to(place).eval()
        drawn: Any = (
            {"do_sample": True, "temperature": self._temperature} if self._temperature else {}
        )

        def answer(messages: Sequence[Message], seed: int) -> str:
            text = chat_text(tokenizer, messages, ask=True)
            asked: Any = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed)
                ids_1T = model.generate(
                    **asked.to(place), **{"do_sample": False, **drawn}, max_new_tokens=self._max_tokens,
                    pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
            return str(
                tokenizer.decode(ids_1T[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
            )

        return answer


def side_by_side(
    writer: ChatModel, ask: Callable[[Item], Made], items: Sequence[Item]
) -> list[Made]:
    """`ask` of every item, in order, at most `writer.parallel` at a time."""
    with ThreadPoolExecutor(max(1, writer.parallel)) as pool:
        return list(pool.map(ask, items))


def digest(folder: str) -> str:
    """Of a language model: an artifact's own, a folder's sha256 over its weights; a name on the hub as it is."""
    if _is_artifact(folder):
        from bridgework import artifacts

        return artifacts.describe(folder).digest
    files = sorted(file for pattern in WEIGHTS for file in Path(folder).glob(pattern))
    if Path(folder).is_dir() and not files:
        raise WeightsError(
            f"{folder} holds no language model: no safetensors, no config.json; name another folder"
        )
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(
                f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode()
            )
    return whole.hexdigest() if files else folder


def picture(image: bytes) -> Message:
    """The part of a message that shows an image to an endpoint that sees."""
    url = f"data:image/{MIME.get(image[:2], 'jpeg')};base64,{base64.b64encode(image).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def drawn(*words: object) -> int:
    """A seed of these words, below 2**31: what every endpoint takes."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:4]) >> 1


def _is_artifact(folder: str) -> bool:
    return (Path(folder) / "artifact.json").is_file()
