"""What a benchmark is: sources in the field's own format, records of every subject, and metrics made from records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align_unlearn.audit.answers import Record
from align_unlearn.audit.statistics import bootstrap_interval, share_interval
from align_unlearn.audit.subjects import Subject

MODELS = ("base", "candidate", "control")


@dataclass(frozen=True)
class Limits:
    """How much of a benchmark is asked: rows of each set (all, where none is named) and new tokens of an answer."""

    rows: int | None
    max_new_tokens: int


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as a suite names it.

    Attributes:
        ask: (subjects, what the suite says, limits) → records, each with `probe`, `group`, `model`, `id`.
        metrics: records → what `audit.json` lists.
        names: what the suite says → the names of those metrics, known before anything is asked.
    """

    ask: Callable[[Mapping[str, Subject], Mapping[str, Any], Limits], list[Record]]
    metrics: Callable[[Sequence[Record]], list[dict[str, Any]]]
    names: Callable[[Mapping[str, Any]], Iterable[str]]


def mean_metric(
    name: str, group: str, better: str, values: Mapping[str, Sequence[float]], budget: str, *, share: bool = False
) -> dict[str, Any]:
    """A metric that is a mean over rows; `share` where the values are 0 or 1, so that the interval is exact."""
    own = list(values["candidate"])
    low, high = share_interval(int(sum(own)), len(own)) if share else bootstrap_interval(own)
    means = {model: sum(values[model]) / len(values[model]) if values.get(model) else None for model in MODELS}
    return {"name": name, "group": group, "better": better, **means, "low": low, "high": high, "n": len(own),
            "budget": budget}  # fmt: skip


def spread(rows: Sequence[Any], count: int | None) -> list[Any]:
    """At most `count` rows, spread evenly over all of them."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[at * len(rows) // count] for at in range(count)]
