"""From a job's data sets to the rows a trainer takes, with the original's own answers where the data has none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from align_unlearn.config import Job
from align_unlearn.data.examples import Example, read_examples, read_refusals
from align_unlearn.data.overlap import check_disjoint
from align_unlearn.data.tokens import prompt_ids, token_columns
from align_unlearn.errors import UserError
from align_unlearn.files import read_json_lines, sha256_of, write_json_lines
from align_unlearn.modeling.generate import generate
from align_unlearn.objectives.table import ONLINE, PREFERENCE, TRAINERS, forget_objective
from align_unlearn.rewards.load import ask_retained
from align_unlearn.training.dpo import preference_ids


@dataclass(frozen=True)
class JobData:
    """The examples of a job: to forget, near it, to keep; and refusals."""

    forget: list[Example]
    neighbours: list[Example]
    retain: list[Example]
    refusals: list[str]

    def hashes(self) -> dict[str, str]:
        """One hash a set, of what the rows say (not of where they lie)."""

        def content(examples: list[Example]) -> list[Any]:
            return [(each.prompt, each.completion, each.chosen) for each in examples]

        sets = {"forget": self.forget, "neighbours": self.neighbours, "retain": self.retain}
        hashed = {name: sha256_of(content(examples)) for name, examples in sets.items()}
        return hashed | {"refusals": sha256_of(self.refusals)}


def read_job_data(job: Job, tokenizer: Any, *, retain_term: bool) -> JobData:
    """Reads and checks the data sets of a job.

    Args:
        retain_term: whether the run has a retain term, so that a retain set is needed.

    Raises:
        UserError: no forget set, no retain set, a set that cannot be read, or forget rows among the rows to keep.
    """
    if not job.forget_dataset:
        raise UserError("No forget set is named.", where="forget_dataset", fix="--forget_dataset builtin:harmful@train")
    if retain_term and not job.retain_dataset:
        raise UserError(
            "There is no retain set.",
            where="retain_dataset",
            fix="name one with --retain_dataset, or go without with --retain none (the report will say so)",
        )

    def read(source: str | None) -> list[Example]:
        cut = {"prefix_tokens": job.prefix_tokens, "continuation_tokens": job.continuation_tokens}
        return read_examples(source, tokenizer, **cut) if source else []

    forget, retain = read(job.forget_dataset), read(job.retain_dataset) if retain_term else []
    neighbours = read(job.neighbour_dataset)
    if not job.allow_overlap:
        check_disjoint(forget, [*retain, *neighbours])
    for example in [*forget, *retain, *neighbours]:
        prompt_ids(tokenizer, example)
    check_chosen(job.objective, forget)
    refusals = read_refusals(job.refusals) if wants_refusals(job.objective) else []
    return JobData(forget, neighbours, retain, refusals)


def check_chosen(objective: str, forget: Sequence[Example]) -> None:
    """Refuses rows without a chosen answer where neither they nor refusals can give one.

    Raises:
        UserError: a row has none.
    """
    if objective in TRAINERS or not forget_objective(objective).chosen or wants_refusals(objective):
        return
    for example in forget:
        if example.chosen is None:
            raise UserError(
                f"The objective '{objective}' needs a chosen answer in every row.",
                where=example.where,
                fix="add a column chosen; align-unlearn data alternatives writes such rows",
            )


def wants_refusals(objective: str) -> bool:
    """Whether refusals are the chosen answers of rows that bring none; `altpo` has the model's own alternatives."""
    if objective in TRAINERS:
        return objective in PREFERENCE
    return forget_objective(objective).chosen and objective != "altpo"


def with_own_answers(data: JobData, job: Job, model: Any, tokenizer: Any, *, seed: int, cache: Path) -> JobData:
    """The same data with an answer of the original's in every row that has none; online, in retain rows only.

    The answers are kept in `cache` and taken from there when the run resumes.

    Args:
        model: the original (the base, adapters off or not yet there).
    """
    sets = {"forget": data.forget, "neighbours": data.neighbours, "retain": data.retain}
    asked = ["retain"] if job.objective in ONLINE else list(sets)
    open_rows = [each for name in asked for each in sets[name] if each.completion is None]
    if not open_rows:
        return data
    prompts = [prompt_ids(tokenizer, each) for each in open_rows]
    key = sha256_of([prompts, job.answer_tokens, job.answer_temperature, seed])
    answers = _cached(cache, key)
    if answers is None:
        said = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=job.answer_tokens,
            temperature=job.answer_temperature,
            seed=seed,
            title="answers of the original",
        )
        answers = [{"key": key, "id": row.id, "answer": each.text, "ends": each.finished}
                   for row, each in zip(open_rows, said, strict=True)]  # fmt: skip
        write_json_lines(cache, answers)
    filled = dict(zip(map(id, open_rows), answers, strict=True))

    def fill(example: Example) -> Example:
        answer = filled.get(id(example))
        if answer is None:
            return example
        return replace(example, completion=answer["answer"] or " ", ends=answer["ends"])

    forget, neighbours, retain = ([fill(each) for each in examples] for examples in sets.values())
    return JobData(forget, neighbours, retain, data.refusals)


def text_rows(
    data: JobData, tokenizer: Any, max_length: int | None, *, chosen: bool = False
) -> tuple[Dataset, Dataset | None]:
    """Forget rows and retain rows of `input_ids` and `labels`; neighbours are kept, like retain rows.

    Args:
        chosen: put each forget row's chosen answer beside it.
    """
    forget = Dataset.from_dict(token_columns(tokenizer, data.forget, max_length=max_length, chosen=chosen))
    return forget, retain_rows([*data.retain, *data.neighbours], tokenizer, max_length)


def asked_rows(data: JobData, args: Any) -> dict[str, list[Example]]:
    """By kind, the rows whose prompts an online run asks: those to retain only where a reward or a cost names them.

    Args:
        args: the configuration of an online trainer.
    """
    asked = {"forget": data.forget, "neighbour": data.neighbours}
    named = ask_retained([*args.specs("rewards"), *args.specs("costs")])
    return asked | ({"retain": data.retain} if named else {})


def with_refusals(data: JobData, *, seed: int) -> JobData:
    """The same data with a refusal as the chosen answer of every forget row that has none."""
    draw = random.Random(seed)
    forget = [each if each.chosen else replace(each, chosen=draw.choice(data.refusals)) for each in data.forget]
    return replace(data, forget=forget)


def retain_rows(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> Dataset | None:
    """Rows of `input_ids` and `labels`, or none where there are no examples."""
    if not examples:
        return None
    return Dataset.from_dict(token_columns(tokenizer, examples, max_length=max_length))


def refusal_rows(
    data: JobData, tokenizer: Any, max_length: int | None, *, seed: int, refusals_per_row: int = 1
) -> Dataset:
    """Preference rows: forget prompts prefer a refusal to the answer, neighbours prefer the answer to a refusal.

    A row that brings its own chosen answer keeps it.

    Args:
        refusals_per_row: how many refusals, all different, each forget row is paired with.

    Raises:
        UserError: there are fewer refusals than that, or a row is longer than `max_length`.
    """
    if not 1 <= refusals_per_row <= len(data.refusals):
        raise UserError(f"There are {len(data.refusals)} refusals, not {refusals_per_row}.", where="refusals_per_row")
    draw = random.Random(seed)
    rows = []
    for example in data.forget:
        for refusal in [example.chosen] if example.chosen else draw.sample(data.refusals, refusals_per_row):
            rows.append({**preference_ids(tokenizer, replace(example, chosen=refusal), max_length), "forget": True})
    for example in data.neighbours:
        turned = replace(example, chosen=example.completion, completion=draw.choice(data.refusals), ends=True)
        pair = preference_ids(tokenizer, turned, max_length, chosen_ends=example.ends)
        rows.append({**pair, "forget": False})
    return Dataset.from_list(rows)


def _cached(cache: Path, key: str) -> list[dict[str, Any]] | None:
    if not cache.is_file():
        return None
    rows = read_json_lines(cache)
    return rows if rows and rows[0]["key"] == key else None
