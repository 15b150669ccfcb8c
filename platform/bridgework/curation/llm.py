"""Chat models that generate text: an OpenAI-compatible endpoint, or a local language model.

Both take the messages of a chat, {"role", "content"} each, and return one answer. The same seed
gives the same answer, if the model supports seeds.
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
from bridgework.storage import sha256

Message = dict[str, Any]
Item = TypeVar("Item")
Output = TypeVar("Output")

ATTEMPTS = 8  # half a minute, including the waits
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 30.0
MAX_BODY = 200  # characters of an endpoint's answer in an error
# by a file's first bytes
MIME = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp"}
WEIGHTS = ("*.safetensors", "config.json", "tokenizer.json")


class ChatModel(Protocol):
    """Answers a chat; up to `parallel` threads may call it at the same time."""

    parallel: int

    def __call__(self, messages: Sequence[Message], seed: int) -> str:
        """Return the answer, without blanks around it; empty if there is none."""


class ChatEndpoint:
    """Client of an endpoint with the chat-completions API."""

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
        """Connect to the endpoint at `url`, e.g. http://host:8000/v1.

        `key` is the environment variable with the API key; it may be unset if the endpoint takes
        none.
        """
        from openai import OpenAI  # the import takes a second

        self.parallel = parallel
        self._url, self._key, self._attempts = url, key, attempts
        self._options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._client = OpenAI(
            base_url=url,
            api_key=os.environ.get(key) or "none",
            max_retries=0,  # tenacity retries
            timeout=timeout_s,
        )

    def __call__(self, messages: Sequence[Message], seed: int) -> str:
        """Return the answer; empty if the endpoint rejects the content of the request (400, 422).

        Raises RunError if the endpoint rejects the API key, and if it still gives no chat
        completion after several attempts.
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
            raise self._error("does not answer", str(error)) from None

    def _ask(self, messages: Sequence[Message], seed: int) -> str:
        """Send one request. Raises RunError for a malformed answer, and the errors of openai."""
        request: Any = {**self._options, "messages": list(messages), "seed": seed}
        body = self._client.chat.completions.with_raw_response.create(**request).text
        try:
            return parse_completion(body)
        except (ValueError, RecursionError):  # RecursionError: thousands of brackets
            raise self._error("answers with no chat completion", body) from None

    def _error(self, what: str, body: str) -> RunError:
        text = " ".join(body.split())[:MAX_BODY] or "an empty answer"
        return RunError(
            f"{self._url} {what}. Got: {text}. Fix: check the URL (up to /v1), the model's name "
            f"and the key in ${self._key}, then run again; earlier answers are kept, row group by "
            "row group"
        )


def parse_completion(body: str) -> str:
    """Return the text of a chat completion in JSON; empty if it has none.

    Raises ValueError for any other body.
    """
    match json.loads(body):
        case {"choices": [{"message": ({"role": _} | {"content": _}) as message}, *_]}:
            text = _content_text(message.get("content")).strip()
            return text.encode(errors="replace").decode()  # replaces lone surrogates
    raise ValueError("no chat completion")


def _content_text(content: Any) -> str:
    """Return the text of a message's content, or of its text parts. Raises ValueError otherwise."""
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
    """Local language model: an artifact of a generative stage, or one of transformers."""

    parallel = 1  # because of the global random state

    def __init__(self, folder: str, *, temperature: float = 0.0, max_tokens: int = 1024) -> None:
        """Load the model from a folder.

        Raises WeightsError if it does not contain a model, SpecError if there is no chat template.
        """
        self._temperature, self._max_tokens = temperature, max_tokens
        load = self._load_artifact if _is_artifact(folder) else self._load_transformers
        self._answer = load(folder)

    def __call__(self, messages: Sequence[Message], seed: int) -> str:
        return self._answer(messages, seed).strip()

    def _load_artifact(self, folder: str) -> Callable[[Sequence[Message], int], str]:
        from bridgework.inference.pipeline import Pipeline

        pipeline = Pipeline.load(folder)

        def answer(messages: Sequence[Message], seed: int) -> str:
            parts = [Part(message["role"], text=message["content"]) for message in messages]
            options: Any = {"temperature": self._temperature, "max_new_tokens": self._max_tokens}
            return pipeline.generate_batch([parts], [[]], [seed], **options)[0]

        return answer

    def _load_transformers(self, folder: str) -> Callable[[Sequence[Message], int], str]:
        import torch
        from transformers import AutoModelForCausalLM

        from bridgework.data.templates import chat_text
        from bridgework.data.tokenization import load_tokenizer
        from bridgework.models import pretrained

        tokenizer = load_tokenizer(folder)
        if tokenizer.chat_template is None:
            raise SpecError(f"{folder}: its tokenizer has no chat template. Fix: use a chat model")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = pretrained.load(AutoModelForCausalLM, folder).to(device).eval()
        sampling: Any = {"do_sample": False}
        if self._temperature:
            sampling = {"do_sample": True, "temperature": self._temperature}

        def answer(messages: Sequence[Message], seed: int) -> str:
            text = chat_text(tokenizer, messages, ask=True)
            prompt: Any = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed)
                ids_1T = model.generate(
                    **prompt.to(device),
                    **sampling,
                    max_new_tokens=self._max_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            new = ids_1T[0, prompt["input_ids"].shape[1] :]
            return str(tokenizer.decode(new, skip_special_tokens=True))

        return answer


def map_parallel(
    model: ChatModel, ask: Callable[[Item], Output], items: Sequence[Item]
) -> list[Output]:
    """Return `ask` of every item, in order, with at most `model.parallel` calls at a time."""
    with ThreadPoolExecutor(max(1, model.parallel)) as pool:
        return list(pool.map(ask, items))


def digest(folder: str) -> str:
    """Return the digest of a language model.

    It is the digest of an artifact, the sha256 over the weights of a folder, or a hub name as it
    is.
    """
    if _is_artifact(folder):
        from bridgework import artifacts

        return artifacts.describe(folder).digest
    files = sorted(file for pattern in WEIGHTS for file in Path(folder).glob(pattern))
    if Path(folder).is_dir() and not files:
        raise WeightsError(
            f"{folder} holds no language model: no safetensors, no config.json. "
            "Fix: give another folder"
        )
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}:{sha256(file)}\n".encode())
    return total.hexdigest() if files else folder


def image_part(image: bytes) -> Message:
    """Return the part of a message with an image, for an endpoint with vision."""
    url = f"data:image/{MIME.get(image[:2], 'jpeg')};base64,{base64.b64encode(image).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def seed_of(*parts: object) -> int:
    """Return a seed below 2**31, which every endpoint accepts, from the hash of the parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4]) >> 1


def _is_artifact(folder: str) -> bool:
    return (Path(folder) / "artifact.json").is_file()
