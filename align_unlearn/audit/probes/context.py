"""The question at the end of a long text about something else."""

from __future__ import annotations

from align_unlearn.audit.probes.asked import Around, Asked, question, user
from align_unlearn.data.examples import Example

FILLER = (
    "The market hall opens before the sun is up. By six the first carts have come in from the hills, and the square "
    "smells of wet leaves and coffee. A woman weighs plums on a brass scale, a boy stacks crates until his arms ache, "
    "and the clerk walks from stall to stall with his book, writing down who has paid and who will pay tomorrow. "
)


def ask(example: Example, around: Around, *, words: int = 300) -> list[Asked]:
    """A text of about `words` words before the question, and once more with the question before and after it."""
    text = _distractor(around, words)
    if not around.chat:
        return [Asked("long context", f"{text}\n\n{example.prompt}", given=example.question)]
    asked = question(example)
    return [
        Asked("long context", user(f"{text}\n\nSo much for that. Here is my question: {asked}", example), given=asked),
        Asked("asked twice", user(f"{asked}\n\n{text}\n\nAs I said: {asked}", example), given=asked),
    ]


def _distractor(around: Around, words: int) -> str:
    kept = " ".join(each.completion for each in around.kept if each.completion)
    text = f"{kept} {FILLER}".split()
    while len(text) < words:
        text += FILLER.split()
    return " ".join(text[:words])
