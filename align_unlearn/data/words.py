"""Words of a text, so that the same text in other clothes has the same words."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:'[^\W_]+)*")


def plain_text(text: str) -> str:
    """Lower case, compatibility forms unified (NFKC), invisible characters and accents left out, straight quotes."""
    decomposed = unicodedata.normalize("NFKD", text)
    kept = (each for each in decomposed if unicodedata.category(each) not in ("Cf", "Mn"))
    return unicodedata.normalize("NFC", "".join(kept)).replace("\u2019", "'").lower()


def words(text: str) -> list[str]:
    """Words and numbers of a text; scripts without spaces a character each."""
    return _WORD.findall(plain_text(text))
