"""The weights quantised and read back, in each precision that a model may be served in."""

from __future__ import annotations

from collections.abc import Sequence

from align_unlearn.audit.answers import Record
from align_unlearn.audit.attacks.bench import Bench, copied
from align_unlearn.audit.subjects import Subject
from align_unlearn.modeling.round_trip import requantise


def attack(
    name: str, subject: Subject, bench: Bench, *, precisions: Sequence[str] = ("nf4", "int8", "q4_0")
) -> list[Record]:
    """The whole model after a round trip through each precision."""
    records = []
    for at, precision in enumerate(precisions):
        changed = copied(subject)
        requantise(changed.model, precision)
        records += bench.measure(name, changed, precision, at, "all linear layers, quantised and read back")
    return records
