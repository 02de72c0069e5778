"""The rows that an audit asks about, by group, and what the page says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from align_unlearn.audit.benchmarks import spread
from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.suite import Suite
from align_unlearn.config import Job
from align_unlearn.data.examples import Example, as_requests, read_examples
from align_unlearn.data.sources import read_rows
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.errors import UserError
from align_unlearn.files import sha256_of


def sources_of(job: Job, suite: Suite | None = None) -> dict[str, Any]:
    """Where each group comes from: held-out sets, else what was trained on, else what the suite names.

    Raises:
        UserError: there is nothing to forget, and the suite is not one of benchmarks alone.
    """
    named = _named(job, suite)
    if "forget" not in named and not (suite is not None and suite.benchmarks and not suite.probes):
        raise UserError("No forget set is named.", where="audit_forget", fix="--forget SOURCE")
    return named


def _named(job: Job, suite: Suite | None) -> dict[str, Any]:
    named: dict[str, Any] = {
        "forget": job.audit_forget or job.forget_dataset,
        "neighbours": job.audit_neighbours,
        "retain": job.audit_retain or job.retain_dataset,
        "holdout": job.audit_holdout,
    }
    if suite is not None:
        named |= {group: source for group, source in suite.sources.items() if not named[group]}
    return {group: source for group, source in named.items() if source}


def check_sources(job: Job, suite: Suite) -> None:
    """Reads every set once, before a model is loaded for it.

    Raises:
        UserError: a set cannot be read.
    """
    for source in _named(job, suite).values():
        _ = read_rows(source) if isinstance(source, str) else _selected(**source)


def audited_sets(job: Job, tokenizer: Any, suite: Suite | None = None) -> dict[str, list[Example]]:
    """The audited rows by group.

    Raises:
        UserError: there is nothing to forget, or a set cannot be read.
    """
    sets = {}
    for group, source in sources_of(job, suite).items():
        rows = read_examples(
            source if isinstance(source, str) else _selected(**source),
            tokenizer,
            prefix_tokens=job.prefix_tokens,
            continuation_tokens=job.continuation_tokens,
        )
        if group == "holdout":
            _check_texts(rows)
        if group == "forget" and job.forget_answers == "examples":
            rows = as_requests(rows)
        most = [each for each in (job.audit_limit, suite.rows.get(group) if suite else None) if each]
        sets[group] = spread(rows, min(most, default=None))
        if suite is not None and suite.chat:
            sets[group] = [_as_chat(example) for example in sets[group]]
    return sets


def answer_tokens(examples: Sequence[Example], job: Job, suite: Suite) -> int:
    """New tokens of a plain answer: the suite's; for passages, which are recited or not, no fewer than the recipe's."""
    passages = any(isinstance(each.prompt, str) and each.completion for each in examples)
    return max(suite.tokens or 0, job.audit_tokens) if passages else suite.tokens or job.audit_tokens


def check_lengths(sets: Mapping[str, Sequence[Example]], subject: Subject, job: Job, suite: Suite) -> None:
    """Refuses rows that are longer than the model, before anything is asked.

    Raises:
        UserError: one is; it is named.
    """
    longest = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return
    for examples in sets.values():
        max_new_tokens = answer_tokens(examples, job, suite)
        for example in examples:
            said = subject.tokenizer(example.completion or "", add_special_tokens=False).input_ids
            length = len(prompt_ids(subject.tokenizer, subject.asked(example))) + max(len(said), max_new_tokens)
            if length > longest:
                raise UserError(
                    f"The row has {length} tokens with its answer, and the model {longest} positions.",
                    where=example.where,
                    fix="leave the row out, or shorten it",
                )


def described_sets(job: Job, suite: Suite, sets: Mapping[str, Sequence[Example]]) -> dict[str, dict[str, Any]]:
    """By group: where it comes from, how many rows were asked, and their hash."""
    sources = sources_of(job, suite)
    return {
        group: {
            "source": _said(sources[group]),
            "rows": len(rows),
            "sha256": sha256_of([[row.prompt, row.completion] for row in rows]),
        }
        for group, rows in sets.items()
    }


def _selected(
    source: str, columns: Mapping[str, str] | None = None, where: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """A set's rows whose columns have the values of `where`, under the names that `columns` gives them.

    Raises:
        UserError: no row has these columns, or these values.
    """
    columns, where, found = columns or {}, where or {}, []
    for row in read_rows(source):
        if all(str(row.columns.get(name)) == value for name, value in where.items()):
            renamed = {columns.get(name, name): value for name, value in row.columns.items()}
            found.append({"id": row.where, **renamed})
    if not found:
        raise UserError(f"No row has {dict(where)}.", where=source)
    if missing := [name for name in columns.values() if name not in found[0]]:
        raise UserError(f"No column becomes '{missing[0]}'.", where=source)
    return found


def _said(source: Any) -> str:
    if isinstance(source, str):
        return source
    return ", ".join([source["source"], *(f"{name} = {value}" for name, value in source.get("where", {}).items())])


def _check_texts(rows: Sequence[Example]) -> None:
    for row in rows:
        if row.completion is None:
            raise UserError("A row that no model has seen needs a text of its own.", where=row.where,
                            fix="a column completion, answer or text")  # fmt: skip


def _as_chat(example: Example) -> Example:
    """A prompt of plain text as a message: benchmarks of requests call their column `prompt`."""
    if isinstance(example.prompt, str):
        return replace(example, prompt=[{"role": "user", "content": example.prompt}])
    return example
