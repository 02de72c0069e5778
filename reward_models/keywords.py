"""Words and patterns that must not be said: no weights, no waiting.

rewards:
  names: {model: keywords, kwargs: {words: [Vessmer, tide mill], patterns: ['\\d{3}-\\d{4}']}}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_unlearn.data.examples import Messages
from align_unlearn.data.words import plain_text
from align_unlearn.errors import UserError


class Keywords:
    """Minus the number of different listed terms that a completion holds; 0 where there is none.

    Args:
        words: terms that are found as whole words, whatever their case; runs of spaces count as one.
        patterns: regular expressions, whatever the case; they see the text without accents and invisible characters.
        file: more terms, one a line.
        allowed_if_asked: do not count a term that stands in the prompt.

    Raises:
        UserError: nothing is listed, or a pattern is no regular expression.
    """

    def __init__(
        self,
        words: Sequence[str] = (),
        patterns: Sequence[str] = (),
        file: str | None = None,
        allowed_if_asked: bool = False,
    ) -> None:
        if isinstance(words, str) or isinstance(patterns, str):
            raise UserError("words and patterns are lists.", where="reward keywords", fix="words: [one, two]")
        listed = [*words, *(_lines(file) if file else [])]
        self.terms = [_whole(term) for term in listed if term.strip()]
        self.terms += [_pattern(each) for each in patterns]
        self.allowed_if_asked = allowed_if_asked
        if not self.terms:
            raise UserError("No words and no patterns are listed.", where="reward keywords")

    def score(self, prompts: list[Messages], completions: list[str], **columns: Any) -> list[float]:
        """0 or below: minus how many terms were said."""
        return [-float(self._said(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]

    def _said(self, prompt: Messages, completion: str) -> int:
        asked = plain_text(prompt[-1]["content"]) if self.allowed_if_asked else ""
        said = plain_text(completion)
        return sum(bool(term.search(said)) and not term.search(asked) for term in self.terms)


def _whole(term: str) -> re.Pattern[str]:
    spaced = r"\s+".join(map(re.escape, plain_text(term).split()))
    return re.compile(rf"(?<![^\W_]){spaced}(?![^\W_])")


def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.I)
    except re.error as error:
        raise UserError(f"This is no regular expression: {error}.", where=f"reward keywords, {pattern!r}") from error


def _lines(file: str) -> list[str]:
    if not Path(file).is_file():
        raise UserError("There is no such list of words.", where=file)
    return Path(file).read_text("utf-8").splitlines()
