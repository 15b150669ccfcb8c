"""Which language a text is in, as py3langid finds it; its model is loaded once a process, in half a second."""

from collections.abc import Sequence
from functools import cache
from typing import Any


def language(text: str) -> tuple[str, float]:
    """An ISO 639 code, and its probability."""
    code, probability = _identifier().classify(text)
    return str(code), float(probability)


def codes() -> Sequence[str]:
    """All that `language` may find: two letters, or three where there are no two."""
    found: Sequence[str] = _identifier().labels
    return found


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
