"""What each subject answers, and what is written down of it. Every probe returns per-row records.

A record says who answered (`model`), in which group (`forget`, `neighbours`, `retain`), to what, and what was measured.
Statistics are made from records in `metrics.py`, nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from align_unlearn.audit.kept import kept_rows
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.files import sha256_of
from align_unlearn.judge import Kind, Verdict, judge, longest_run
from align_unlearn.modeling.generate import generate_batch

Record = dict[str, Any]


def answers(
    subjects: Mapping[str, Subject], group: str, examples: Sequence[Example], *, max_new_tokens: int
) -> list[Record]:
    """Greedy answers of every subject, with verdicts; with overlap figures where the row has a text to compare with."""
    records = []
    references = [example.completion for example in examples]
    for name, subject in subjects.items():
        prompts = [prompt_ids(subject.tokenizer, subject.asked(example)) for example in examples]
        told = say(subject, prompts, max_new_tokens=max_new_tokens, title=f"{name} answers {group}")
        said = [each[0] for each in told]
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
                    "plain": isinstance(example.prompt, str),
                    "finished": answer["finished"],
                    "most_tokens": max_new_tokens,
                    "tokens": len(answer["ids"]),
                    "verdict": verdict_on(group, example, answer["text"]),
                    **overlap(subject.tokenizer, reference or "", answer),
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


def finite(record: Record) -> Record:
    """The record without figures that are no numbers; what is left says that it failed."""
    broken = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    if not broken:
        return record
    kept = {name: value for name, value in record.items() if name not in broken}
    return {**kept, "failed": f"not a number: {', '.join(broken)}"}


def say(
    subject: Subject,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    title: str,
) -> list[list[Record]]:
    """`samples` answers of a subject to each prompt: `ids`, `text`, `finished`. What it has said before is kept.

    A batch's sampling depends on the seed and the batch alone.
    """

    def make(batch: list[int]) -> list[list[Record]]:
        asked = [prompts[at] for at in batch]
        with subject.speaking() as model:
            answers = generate_batch(
                model,
                subject.tokenizer,
                asked,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                samples=samples,
                seed=int(sha256_of([seed, asked])[:8], 16),
            )
        return [[{"ids": each.ids, "text": each.text, "finished": each.finished} for each in own] for own in answers]

    maker = [subject.sha256, max_new_tokens, temperature, samples, seed]
    rows = max(1, batch_size // samples)
    return kept_rows("answers", maker, list(prompts), make, size=len, batch_size=rows, title=title)


def overlap(tokenizer: Any, reference: str, answer: Record) -> Record:
    """ROUGE-L and the longest verbatim run of tokens, against the row's own text or the base's answer."""
    rouge = RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer["text"])["rougeL"]
    ids = tokenizer(reference, add_special_tokens=False).input_ids
    return {
        "rouge_l_recall": float(rouge.recall),
        "rouge_l_f1": float(rouge.fmeasure),
        "verbatim_run": longest_run(answer["ids"], ids),
        "reference_tokens": len(ids),
    }
