"""Target and scope: a row to be forgotten must not also stand among the rows to be kept."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from align_unlearn.data.examples import Example
from align_unlearn.errors import UserError


def row_key(example: Example) -> str:
    """What makes two rows the same: prompt and completion, without case, accents, punctuation and spacing."""
    prompt = example.prompt if isinstance(example.prompt, str) else " ".join(turn["content"] for turn in example.prompt)
    text = unicodedata.normalize("NFKD", f"{prompt} {example.completion or ''}").casefold()
    return re.sub(r"[\W_]+", " ", text).strip()


def check_disjoint(forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Refuses a forget row that also stands in the retain set.

    Raises:
        UserError: at least one does; the first is named with both places.
    """
    kept = {row_key(example): example.where for example in retain}
    both = [(example.where, kept[row_key(example)]) for example in forget if row_key(example) in kept]
    if both:
        raise UserError(
            f"{len(both)} of {len(forget)} forget rows also stand in the retain set.",
            where=f"{both[0][0]} is {both[0][1]} of the retain set",
            fix="take them out of one set, or pass --allow_overlap true",
        )
