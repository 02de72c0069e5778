"""Text that a model or a data set wrote, made fit to be seen: nothing in it can act, hide, or turn what is beside it.

The template escapes markup. What is left are characters that do something: they reorder the line, break it off, or are
no characters at all.
"""

from __future__ import annotations

import difflib
import re
import unicodedata

_ACTING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_KEPT = {"\n", "\t"}
ALIKE = 0.3
"""Answers that share less than this are not marked word by word: all of it would be."""


def visible(text: str) -> str:
    """The text with every character that acts (controls, direction marks, lone surrogates) written as ⟨U+202E⟩."""
    return "".join(
        f"⟨U+{ord(each):04X}⟩" if each not in _KEPT and unicodedata.category(each) in _ACTING else each for each in text
    )


def differences(before: str, after: str) -> list[tuple[str, str]]:
    """The words of `after` in pieces: `same` as in `before`, or `new`. One piece `same` where they are hardly alike."""
    old, new = re.findall(r"\s+|\S+", before), re.findall(r"\s+|\S+", after)
    matcher = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    alike = difflib.SequenceMatcher(a=before.split(), b=after.split(), autojunk=False).ratio()
    if not old or alike < ALIKE:
        return [("same", after)]
    pieces = []
    for kind, _, _, start, end in matcher.get_opcodes():
        if end > start:
            pieces.append(("same" if kind == "equal" else "new", "".join(new[start:end])))
    return pieces
