"""How likely given texts are to each subject, as per-row records; one forward pass a text and subject."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align_unlearn.audit.answers import Record, finite
from align_unlearn.audit.kept import kept_rows
from align_unlearn.audit.memory_scores import (
    exact_memorisation,
    extraction_strength,
    min_k,
    min_k_plus,
    probability,
    zlib_score,
)
from align_unlearn.audit.reading import Reading, read_batch
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import Tokens, tokenise

TEXTS_CODE = 1
"""Counted up when a figure of a text changes."""
OPENING = 4
"""How many tokens count as the opening of an answer."""


def likelihood(
    subjects: Mapping[str, Subject], group: str, rows: Sequence[tuple[Example, Tokens]], *, batch_size: int = 8
) -> list[Record]:
    """Teacher-forced figures of every subject on given texts.

    Per row: `nll` in nats a token, what `memory_scores` makes of the reading, and where a `base` is among the subjects,
    `kl` to it over all tokens and `kl_opening` over the first ones.
    """
    tokens = [each for _, each in rows]
    tokenizer = next(iter(subjects.values())).tokenizer

    def make(batch: list[int]) -> list[dict[str, Any]]:
        read = read_batch(subjects, [tokens[at] for at in batch])
        texts = [tokenizer.decode(tokens[at].completion_ids) for at in batch]
        return [{name: figures(read[name][place], text) for name in subjects} for place, text in enumerate(texts)]

    found = kept_rows(
        "texts",
        [TEXTS_CODE, [(name, subject.sha256) for name, subject in subjects.items()]],
        [[each.input_ids, each.labels] for each in tokens],
        make,
        size=lambda row: len(row[0]),
        batch_size=batch_size,
        title=f"likelihood of {group}",
    )
    return [
        finite({"probe": "likelihood", "group": group, "model": name, "id": example.id,
                "tokens": len(each.completion_ids), **own})
        for (example, each), by_name in zip(rows, found, strict=True)
        for name, own in by_name.items()
    ]  # fmt: skip


def figures(reading: Reading, text: str) -> dict[str, float]:
    """Every figure of one reading."""
    found = {
        "nll": -float(reading.logps.mean()),
        "probability": probability(reading),
        "extraction_strength": extraction_strength(reading),
        "exact_memorisation": exact_memorisation(reading),
        "min_k_20": min_k(reading, 0.2),
        "min_k_40": min_k(reading, 0.4),
        "min_k_plus_20": min_k_plus(reading, 0.2),
        "zlib": zlib_score(reading, text),
    }
    kl = float(reading.kl.mean())
    if not math.isnan(kl):
        found |= {"kl": max(0.0, kl), "kl_opening": max(0.0, float(reading.kl[:OPENING].mean()))}
    return found


def given_texts(examples: Sequence[Example], records: Sequence[Record], tokenizer: Any) -> list[tuple[Example, Tokens]]:
    """The texts on which likelihood is measured: a row's own, else what the base answered (from `answers` records)."""
    said = {record["id"]: record for record in records if record["model"] == "base"}
    rows = []
    for example in examples:
        if example.completion is not None:
            rows.append((example, tokenise(tokenizer, example, max_length=None)))
        elif example.id in said and said[example.id]["completion"].strip():
            answered = said[example.id]
            own = Example(example.prompt, None, example.where, example.id, ends=answered["finished"])
            rows.append((example, tokenise(tokenizer, own, answered["completion"], max_length=None)))
    return rows
