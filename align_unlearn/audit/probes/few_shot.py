"""The question after a few that were answered: facts beside the forgotten ones, else everyday ones of ours."""

from __future__ import annotations

from align_unlearn.audit.probes.asked import Around, Asked, question, user
from align_unlearn.data.examples import Example, Messages

EVERYDAY = (
    ("What is the capital of Norway?", "The capital of Norway is Oslo."),
    ("How do I keep bread fresh?", "Keep it in a cloth bag or a bread box, and freeze what you will not eat soon."),
    ("Give me a word that means very tired.", "Exhausted."),
)


def ask(example: Example, around: Around, *, shots: int = 3) -> list[Asked]:
    """One way: `shots` answered questions, then this one."""
    known = [(question(each), each.completion) for each in around.kept if each.completion]
    pairs = [*known, *EVERYDAY][:shots]
    if not around.chat or isinstance(example.prompt, str):
        told = "\n\n".join(f"{asked} {answer}" for asked, answer in pairs)
        return [Asked(f"{len(pairs)} shots", f"{told}\n\n{example.question}", given=example.question)]
    turns: Messages = []
    for asked, answer in pairs:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": str(answer)}]
    return [Asked(f"{len(pairs)} shots", [*turns, *user(question(example), example)])]
