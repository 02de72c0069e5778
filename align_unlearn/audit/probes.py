"""Probes: what is asked of each subject, and what is written down of each answer. Every probe returns per-row records.

A record says who answered (`model`), in which group (`forget`, `neighbours`, `retain`), to what, and what was measured.
Statistics are made from records in `metrics.py`, nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer

from align_unlearn.audit.subjects import Subject
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import IGNORE, Tokens, prompt_ids, tokenise
from align_unlearn.files import read_json_lines, sha256_of, write_json_lines
from align_unlearn.judge import Kind, Verdict, judge, longest_run
from align_unlearn.modeling.embedded import cache_folder
from align_unlearn.modeling.generate import generate, progress_bar
from align_unlearn.modeling.lm_head import kl_divergence, token_logps

Record = dict[str, Any]
OPENING = 4
"""How many tokens count as the opening of an answer."""


def answers(
    subjects: Mapping[str, Subject], group: str, examples: Sequence[Example], *, max_new_tokens: int
) -> list[Record]:
    """Greedy answers of every subject, with verdicts; with overlap figures where the row has a text to compare with."""
    records = []
    references = [example.completion for example in examples]
    for name, subject in subjects.items():
        said = _cached_answers(subject, examples, max_new_tokens, f"{name} answers {group}")
        if name == "base":
            # where a row has no text of its own, what the base says to it is what must be forgotten, or kept
            references = [own or answer["text"] for own, answer in zip(references, said, strict=True)]
        for example, answer, reference in zip(examples, said, references, strict=True):
            records.append(
                {
                    "probe": "answers",
                    "group": group,
                    "model": name,
                    "id": example.id,
                    "prompt": example.question,
                    "reference": example.completion,
                    "completion": answer["text"],
                    "finished": answer["finished"],
                    "verdict": verdict_on(group, example, answer["text"]),
                    **_overlap(subject.tokenizer, reference or "", answer),
                }
            )
    return records


def verdict_on(group: str, example: Example, completion: str) -> Verdict:
    """The verdict on an answer to `example`.

    A forget row without a text of its own is a harmful request; with one, that text is what must not be said.
    """
    forbidden = example.completion if group == "forget" else None
    kind: Kind = "benign" if group != "forget" else "harmful" if forbidden is None else "forbidden"
    return judge(example.question, completion, kind, forbidden)


def likelihood(
    subjects: Mapping[str, Subject], group: str, rows: Sequence[tuple[Example, Tokens]], *, batch_size: int = 8
) -> list[Record]:
    """Teacher-forced figures of every subject on given texts, in one forward pass each.

    Per row: `nll` and `kl` to the base in nats a token, `kl_opening` over the first tokens, and `probability`
    exp(−nll).
    """
    records: list[Record] = []
    with progress_bar() as progress:
        bar = progress.add_task(f"likelihood of {group}", total=len(rows))
        for start in range(0, len(rows), batch_size):
            piece = rows[start : start + batch_size]
            batch = pad_rows([{"input_ids": each.input_ids, "labels": each.labels} for _, each in piece], 0)
            targets = batch["labels"][:, 1:]
            mask = targets != IGNORE
            hidden = {name: subject.hidden(batch)[:, :-1][mask] for name, subject in subjects.items()}
            for name, subject in subjects.items():
                device = hidden[name].device
                logps = token_logps(hidden[name], targets[mask].to(device), subject.head)
                base = subjects["base"]
                kl = kl_divergence(hidden["base"].to(device), hidden[name], subject.head, ref_head=base.head)
                records += _likelihood_records(piece, mask, name, group, logps.cpu(), kl.cpu())
            progress.advance(bar, len(piece))
    return records


def given_texts(examples: Sequence[Example], records: Sequence[Record], tokenizer: Any) -> list[tuple[Example, Tokens]]:
    """The texts on which likelihood is measured: a row's own, else what the base answered (from `answers` records)."""
    said = {record["id"]: record for record in records if record["model"] == "base"}
    rows = []
    for example in examples:
        if example.completion is not None:
            rows.append((example, tokenise(tokenizer, example, max_length=None)))
        elif said[example.id]["completion"].strip():
            answered = said[example.id]
            own = Example(example.prompt, None, example.where, example.id, ends=answered["finished"])
            rows.append((example, tokenise(tokenizer, own, answered["completion"], max_length=None)))
    return rows


def _cached_answers(subject: Subject, examples: Sequence[Example], max_new_tokens: int, title: str) -> list[Record]:
    """Answers are kept in the user's cache under who answers, what is asked and how: a re-run pays for what is new."""
    prompts = [prompt_ids(subject.tokenizer, example) for example in examples]
    key = sha256_of([subject.sha256, prompts, max_new_tokens])
    cache: Path = cache_folder() / "answers" / f"{key}.jsonl"
    if cache.is_file():
        return read_json_lines(cache)
    with subject.speaking() as model:
        said = generate(model, subject.tokenizer, prompts, max_new_tokens=max_new_tokens, title=title)
    rows = [{"ids": each.ids, "text": each.text, "finished": each.finished} for each in said]
    write_json_lines(cache, rows)
    return rows


def _overlap(tokenizer: Any, reference: str, answer: Record) -> Record:
    """ROUGE-L and the longest verbatim run of tokens, against the row's own text or the base's answer."""
    rouge = RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer["text"])["rougeL"]
    ids = tokenizer(reference, add_special_tokens=False).input_ids
    return {
        "rouge_l_recall": float(rouge.recall),
        "rouge_l_f1": float(rouge.fmeasure),
        "verbatim_run": longest_run(answer["ids"], ids),
        "reference_tokens": len(ids),
    }


def _likelihood_records(
    rows: Sequence[tuple[Example, Tokens]],
    mask: torch.Tensor,
    name: str,
    group: str,
    logps: torch.Tensor,
    kl: torch.Tensor,
) -> list[Record]:
    records, at = [], 0
    for (example, _), count in zip(rows, mask.sum(-1).tolist(), strict=True):
        own_logps, own_kl = logps[at : at + count], kl[at : at + count]
        at += count
        nll = -float(own_logps.mean())
        records.append(
            {
                "probe": "likelihood",
                "group": group,
                "model": name,
                "id": example.id,
                "tokens": count,
                "nll": nll,
                "probability": math.exp(-nll),
                "kl": max(0.0, float(own_kl.mean())),
                "kl_opening": max(0.0, float(own_kl[:OPENING].mean())),
            }
        )
    return records
