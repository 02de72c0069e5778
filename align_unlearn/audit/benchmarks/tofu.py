"""TOFU's two headline figures, forget quality and model utility, and what they are made of.

    benchmarks: {tofu: {forget: …, retain: …, real_authors: …, world_facts: …}}

The sets are those whose names end in `_perturbed`. Without a retain-only control there is no forget quality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from align_unlearn.audit.answers import Record, finite
from align_unlearn.audit.benchmarks.benchmark import MODELS, Limits, spread
from align_unlearn.audit.statistics import bootstrap_interval
from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.tofu import UTILITY_SETS, TofuRow, tofu_figures
from align_unlearn.audit.tofu_probe import read_questions
from align_unlearn.audit.tofu_suite import kept_evaluation
from align_unlearn.errors import UserError, unknown_name

SETS = ("forget", *UTILITY_SETS)
MEANS = ("probability", "rouge_l", "truth_ratio", "extraction_strength", "exact_memorisation")
FIGURES = ("forget_quality", "model_utility", *(f"{group}.{each}" for group in ("forget", "retain") for each in MEANS))
LOWER = ("forget.probability", "forget.rouge_l", "forget.extraction_strength", "forget.exact_memorisation")


def ask(subjects: Mapping[str, Subject], sources: Mapping[str, Any], limits: Limits) -> list[Record]:
    """All four sets of every subject.

    Raises:
        UserError: a set is missing or unknown, or a row has no wrong answers.
    """
    for name in sources:
        if name not in SETS:
            raise unknown_name("TOFU set", name, SETS, where="benchmarks: tofu")
    for name in SETS:
        if name not in sources:
            raise UserError(f"TOFU's set '{name}' is not named.", where="benchmarks: tofu")
    sets = {name: spread(read_questions(str(sources[name])), limits.rows) for name in SETS}
    records = []
    for who, subject in subjects.items():
        for name, rows in kept_evaluation(subject, sets, limits.max_new_tokens).items():
            for question, row in zip(sets[name], rows, strict=True):
                about = {"probe": "tofu", "group": "tofu", "set": name, "model": who, "id": question.example.id}
                records.append(finite({**about, **asdict(row)}))
    return records


def metrics(records: Sequence[Record]) -> list[dict[str, Any]]:
    """`tofu.forget_quality`, `tofu.model_utility`, and means on the forget and the retain set."""
    tables = {who: table for who in MODELS if (table := evaluation(records, who))}
    if "candidate" not in tables:
        return []
    figures = {who: tofu_figures(table, tables.get("control")) for who, table in tables.items()}
    found = []
    for name in FIGURES:
        if name not in figures["candidate"]:
            continue
        low, high = _interval(name, tables["candidate"])
        found.append(
            {"name": f"tofu.{name}", "group": "tofu", "better": "lower" if name in LOWER else "higher",
             **{who: figures[who].get(name) if who in figures else None for who in MODELS}, "low": low, "high": high,
             "n": len(tables["candidate"]["retain" if name.startswith("retain") else "forget"]),
             "budget": "the benchmark's definitions"}
        )  # fmt: skip
    return found


def evaluation(records: Sequence[Record], who: str) -> dict[str, list[TofuRow]]:
    """A subject's rows by set, as the benchmark's functions take them."""
    table: dict[str, list[TofuRow]] = {}
    for record in records:
        if record["probe"] == "tofu" and record["model"] == who and "failed" not in record:
            figures = {name: record[name] for name in TofuRow.__dataclass_fields__}
            figures["perturbed_losses"] = tuple(figures["perturbed_losses"])
            table.setdefault(record["set"], []).append(TofuRow(**figures))
    return table


def _interval(name: str, table: Mapping[str, Sequence[TofuRow]]) -> tuple[float | None, float | None]:
    """Bootstrap over rows for means; the headline figures are made of whole sets and have none."""
    group, _, figure = name.partition(".")
    values = {
        "probability": lambda row: row.probability,
        "rouge_l": lambda row: row.rouge_recall,
        "truth_ratio": lambda row: (
            min(row.truth_ratio, 1 / row.truth_ratio) if group == "forget" else max(0.0, 1 - row.truth_ratio)
        ),
        "extraction_strength": lambda row: row.extraction_strength,
        "exact_memorisation": lambda row: row.exact_memorisation,
    }
    return bootstrap_interval([values[figure](row) for row in table[group]]) if figure else (None, None)
