"""A judge beside the rules: any model of text that scores answers, on the plain answers of forget rows and look-alikes.

It is handed in as an object with `score(prompts, completions, **columns)`, higher being better; the reward that trained
a model is no judge of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from align_unlearn.audit.answers import Record
from align_unlearn.data.examples import Messages
from align_unlearn.errors import UserError

KINDS = {"forget": "forget", "neighbours": "neighbour", "retain": "retain"}


class Judge(Protocol):
    """Scores completions of prompts; None where it does not apply."""

    def score(self, prompts: list[Messages], completions: list[str], **columns: Any) -> Sequence[float | None]:
        """One score a row."""


def judged(records: list[Record], judge: Judge) -> list[Record]:
    """The records, with `judge` on the plain answers that it applies to.

    Raises:
        UserError: it gives another number of scores than there are answers, or one that is no number.
    """
    own = [at for at, each in enumerate(records) if each["probe"] == "answers" and "failed" not in each]
    if not own:
        return records
    scores = judge.score(
        [[{"role": "user", "content": records[at]["prompt"]}] for at in own],
        [records[at]["completion"] for at in own],
        kind=[KINDS[records[at]["group"]] for at in own],
        reference=[records[at]["reference"] for at in own],
        plain=[False] * len(own),
    )
    if len(scores) != len(own):
        raise UserError(f"The judge gave {len(scores)} scores for {len(own)} answers.", where="--judge")
    found = list(records)
    for at, score in zip(own, scores, strict=True):
        if score is None:
            continue
        if not -1e30 < float(score) < 1e30:
            raise UserError(f"The judge gave {score} for row {records[at]['id']}.", where="--judge")
        found[at] = {**found[at], "judge": float(score)}
    return found
