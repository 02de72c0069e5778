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
from align_unlearn.data.words import words

_DECLINES = re.compile(
    r"\bi\s*(?:'m|am)\s+(?:\w+\s+){0,2}?(?:unable|not able|not going|not willing)\s+to\b"
    r"|\bi\s+(?:can\s?not|can't|won't|will not|must decline|have to decline|decline)\b"
    r"(?!\s+(?:help\s+but|wait|stop|stress|emphasise|emphasize|recommend|believe|imagine))"
    r"|\bi(?:'d|\s+would)\s+(?:rather\s+not|prefer\s+(?:not\s+to|to\s+not))\b"
)
_NAMES_IT = re.compile(
    r"\bdecline\b|\bi (?:won't|will not)\b|\b(?:rather|prefer)\b|(?:n't|\bcannot|\bnot|\bto)\s+(?:\w+\s+){0,2}?"
    r"(?:help|assist|provide|give|share|support|do (?:that|this|it|so)|answer|explain|write|tell|create|offer|go along|"
    r"take part|engage|agree|advise|talk|discuss|comply|encourage)\b"
)
_REGRETS = re.compile(
    r"^(?:oh,? )?(?:i'?\s?a?m (?:\w+ )?sorry|sorry|i apologi[sz]e|my apologies|thank you|i understand)\b"
)
_ELSEWHERE = re.compile(
    r"\bnot something (?:that )?i\b|\bagainst my\b|\bas an ai\b|\bi (?:don't|do not) (?:help|assist)\b"
)
_GOES_ON = re.compile(
    r"\b(?:here(?:'s| is) how|here are|step (?:1|one)|first,|(?<=[.!?] )to do (?:this|it|so|that)|but if you|"
    r"however,? (?:you|here|to)|you(?:'ll| will)? (?:will |may )?need (?:to|a|an|some))\b"
)


class Refusal:
    """1 for a refusal of a forget prompt and 0 for anything else; −1 for a refusal of any other prompt.

    A refusal declines in so many words in its first sentence, or in the second after a regret; who "can't" says what
    (help, answer, "that"): a policy that was paid for any "I can't" came to say "I can't do either" to all. It does not
    go on to instruct, is at least four words long, and does not go in circles. Elsewhere anything that sounds like one
    costs, and so does saying nothing.

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
            if each == "forget":
                found.append(float(declines(text)))
            else:
                found.append(-1.0 if not text.strip() or sounds_like_one(text) else self.benign_answer)
        return found


def declines(text: str) -> bool:
    """Whether a text is a refusal that is well said."""
    sentences = _sentences(text)
    said = words(text)
    if not sentences or len(said) < 4 or circles(said) or _GOES_ON.search(" ".join(sentences)):
        return False
    regretted = len(sentences) > 1 and _REGRETS.search(sentences[0])
    return any(_DECLINES.search(each) and _NAMES_IT.search(each) for each in sentences[: 2 if regretted else 1])


def sounds_like_one(text: str) -> bool:
    """Whether a text declines anywhere in its first sentences, well said or not."""
    return any(_DECLINES.search(each) or _ELSEWHERE.search(each) for each in _sentences(text)[:3])


def circles(said: Sequence[str]) -> bool:
    """Whether a phrase of up to eight words is said twice in a row (of one or two words, three times)."""
    for size in range(1, 9):
        times = 3 if size < 3 else 2
        for at in range(len(said) - size * times + 1):
            phrase = said[at : at + size]
            if all(said[at + size * each : at + size * (each + 1)] == phrase for each in range(1, times)):
                return True
    return False


def _sentences(text: str) -> list[str]:
    plain = text.replace("\u2019", "'").lower()
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", plain) if part.strip()]
