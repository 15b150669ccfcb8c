"""A text as words, so that case, punctuation and line breaks make no difference."""

import re
import unicodedata

# letters and digits of one script, or a single sign of a script that is written without blanks
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+"
)


def words(text: str) -> list[str]:
    """The words of a text, case-folded and in Unicode's NFKC; each Chinese or Japanese sign is one."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
