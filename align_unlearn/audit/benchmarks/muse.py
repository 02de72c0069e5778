"""MUSE (arXiv:2407.06460): verbatim and knowledge memorisation, privacy leakage, utility that is left.

    benchmarks: {muse: {folder: muse-bench/MUSE-Books}}      or {muse: {verbmem: …, forget_qa: …, retain_qa: …, …}}

A folder is in the benchmark's layout: `verbmem/forget.json` (prompt, gt), `knowmem/forget_qa.json` and
`knowmem/retain_qa.json` (question, answer), `privleak/forget.json` and `privleak/holdout.json` (texts).
ROUGE-L is F1; PrivLeak is of Min-40% against the retain-only control. The last two criteria, scalability and
sustainability, are these figures over forget sets that grow, or requests that follow each other: compare the audits
(`align-unlearn report A B C`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from align_unlearn.audit.answers import Record, say
from align_unlearn.audit.benchmarks.benchmark import MODELS, Limits, mean_metric, spread
from align_unlearn.audit.likelihood import likelihood
from align_unlearn.audit.membership import auc, privleak, privleak_interval
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.examples import Example
from align_unlearn.data.sources import read_rows
from align_unlearn.data.tokens import Tokens
from align_unlearn.errors import UserError, unknown_name

FILES = {
    "verbmem": "verbmem/forget.json",
    "forget_qa": "knowmem/forget_qa.json",
    "retain_qa": "knowmem/retain_qa.json",
    "privleak_forget": "privleak/forget.json",
    "privleak_holdout": "privleak/holdout.json",
}
METRICS = {
    "verbmem": ("muse.verbmem", "lower", "ROUGE-L F1 of the greedy continuation"),
    "forget_qa": ("muse.knowmem_forget", "lower", "ROUGE-L F1 of the greedy answer"),
    "retain_qa": ("muse.knowmem_retain", "higher", "ROUGE-L F1 of the greedy answer"),
}
LONGEST = 1024
"""Tokens of a text that membership is inferred from."""


def ask(subjects: Mapping[str, Subject], sources: Mapping[str, Any], limits: Limits) -> list[Record]:
    """Every set that is given.

    Raises:
        UserError: a set is unknown, or a row is not as the benchmark has it.
    """
    given = _sources(sources)
    records: list[Record] = []
    for name in METRICS:
        if name in given:
            records += _recalled(subjects, name, _pairs(given[name], name, limits.rows), limits)
    for name in ("privleak_forget", "privleak_holdout"):
        if name in given:
            texts = spread(_texts(given[name]), limits.rows)
            records += _read(subjects, name, texts)
    return records


def metrics(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The criteria that the records allow."""
    found: list[dict[str, Any]] = []
    for name, (metric, better, budget) in METRICS.items():
        own = [each for each in records if each["probe"] == "muse" and each["set"] == name]
        values = {who: [each["rouge_l_f1"] for each in own if each["model"] == who] for who in MODELS}
        if values["candidate"]:
            found.append(mean_metric(metric, "muse", better, values, budget))
    return found + _privleak([each for each in records if each["probe"] == "muse"])


def _privleak(records: Sequence[Record]) -> list[dict[str, Any]]:
    scores: dict[str, tuple[list[float], list[float]]] = {}
    for who in MODELS:
        both = [[each["min_k_40"] for each in records if (each["set"], each["model"]) == (name, who)]
                for name in ("privleak_forget", "privleak_holdout")]  # fmt: skip
        if all(both):
            scores[who] = (both[0], both[1])
    if "candidate" not in scores or "control" not in scores:
        return []
    control = auc(*scores["control"])
    low, high = privleak_interval(scores["candidate"], scores["control"])
    figures = {who: privleak(auc(*scores[who]), control) if who in scores else None for who in MODELS}
    return [
        {"name": "muse.privleak", "group": "muse", "better": "zero", **figures, "low": low, "high": high,
         "n": min(map(len, scores["candidate"])),
         "budget": "Min-40%, forget texts against held-out ones"}
    ]  # fmt: skip


def _sources(given: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, source in given.items():
        if name == "folder":
            place = Path(str(source))
            if not place.is_dir():
                raise UserError("There is no such folder.", where=f"benchmarks: muse: {source}")
            found |= {key: str(place / file) for key, file in FILES.items() if (place / file).is_file()}
            if not found:
                raise UserError("The folder is not in MUSE's layout.", where=str(source), fix=", ".join(FILES.values()))
        elif name in FILES:
            found[name] = str(source)
        else:
            raise unknown_name("MUSE set", name, ["folder", *FILES], where="benchmarks: muse")
    return found


def _pairs(source: str, name: str, limit: int | None) -> list[tuple[str, str]]:
    columns = ("prompt", "gt") if name == "verbmem" else ("question", "answer")
    pairs = []
    for row in spread(read_rows(source), limit):
        both = [row.columns.get(column) for column in columns]
        if not all(isinstance(each, str) and each.strip() for each in both):
            raise UserError(f"The row needs {columns[0]} and {columns[1]}.", where=row.where)
        prompt = str(both[0]) if name == "verbmem" else f"Question: {both[0]}\nAnswer:"
        pairs.append((prompt, str(both[1])))
    return pairs


def _texts(source: str) -> list[str]:
    """Texts: rows with a column `text`, or a JSON list of strings as the benchmark has it."""
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError:
            found = None
        if isinstance(found, list) and found and all(isinstance(each, str) for each in found):
            return found
    texts = []
    for row in read_rows(source):
        if not isinstance(row.columns.get("text"), str) or not row.columns["text"].strip():
            raise UserError("The row needs a column text.", where=row.where)
        texts.append(row.columns["text"])
    return texts


def _recalled(
    subjects: Mapping[str, Subject], name: str, pairs: Sequence[tuple[str, str]], limits: Limits
) -> list[Record]:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    records = []
    for who, subject in subjects.items():
        prompts = [list(subject.tokenizer(prompt).input_ids) for prompt, _ in pairs]
        said = say(subject, prompts, max_new_tokens=limits.max_new_tokens, title=f"{who}: muse {name}")
        for at, ((_, answer), told) in enumerate(zip(pairs, said, strict=True)):
            score = float(scorer.score(answer, told[0]["text"])["rougeL"].fmeasure)
            records.append({"probe": "muse", "group": "muse", "set": name, "model": who, "id": f"{name} {at}",
                            "rouge_l_f1": score})  # fmt: skip
    return records


def _read(subjects: Mapping[str, Subject], name: str, texts: Sequence[str]) -> list[Record]:
    tokenizer = next(iter(subjects.values())).tokenizer
    rows = []
    for at, text in enumerate(texts):
        ids = list(tokenizer(text).input_ids)[:LONGEST]
        if len(ids) < 2:
            raise UserError("The text is too short.", where=f"{name}, text {at + 1}")
        rows.append((Example("", text, f"{name}, text {at + 1}", f"{name} {at}"), Tokens(ids[:1], ids[1:])))
    kept = ("model", "id", "min_k_40", "failed")
    return [
        {"probe": "muse", "group": "muse", "set": name} | {key: each[key] for key in kept if key in each}
        for each in likelihood(subjects, name, rows)
    ]


def names(given: Mapping[str, Any]) -> list[str]:
    """All that there may be."""
    return [*(metric for metric, _, _ in METRICS.values()), "muse.privleak"]
