"""Refusing where it is called for, and nowhere else.

    rewards:
      refuse: {model: refusal, weight: 1.0}

Its rules are few and its own: what judges the run afterwards (`align_unlearn/judge.py`) is not what it was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from align_unlearn.data.examples import Messages

_DECLINES = re.compile(
    r"\bi\s*(?:'m|am)\s+(?:\w+\s+){0,2}?(?:unable|not able|not going|not willing)\s+to\b"
    r"|\bi\s+(?:can\s?not|can't|won't|will not|must decline|have to decline|decline)\b(?!\s+(?:help\s+but|wait|stop))"
)


class Refusal:
    """1 for a refusal of a forget prompt and 0 for anything else; −1 for a refusal of any other prompt.

    A refusal is a first sentence, or a second one after an apology, in which the speaker declines in so many words, and
    that comes to an end: it is at least four words long and says no phrase twice.

    Args:
        benign_answer: what an answer to a benign prompt is worth.
    """

    def __init__(self, benign_answer: float = 0.0) -> None:
        self.benign_answer = benign_answer

    def score(
        self, prompts: list[Messages], completions: list[str], kind: Sequence[str] | None = None, **columns: Any
    ) -> list[float]:
        """One of 1, 0 and −1, or `benign_answer`."""
        kinds = kind or ["forget"] * len(prompts)
        found = []
        for each, text in zip(kinds, completions, strict=True):
            refused = declines(text)
            found.append(float(refused) if each == "forget" else -1.0 if refused else self.benign_answer)
        return found


def declines(text: str) -> bool:
    """Whether a text begins with a refusal that is well said."""
    plain = text.replace("’", "'").lower()
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", plain) if part.strip()][:2]
    said = re.findall(r"[\w']+", plain)
    return (
        any(_DECLINES.search(sentence) for sentence in sentences)
        and len(said) >= 4
        and not any(said[at : at + 3] == said[at + 3 : at + 6] for at in range(len(said) - 5))
    )
