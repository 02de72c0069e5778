"""A probe asked of every subject: prompts made, answers taken and judged, a record a row, way of asking and draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from align_unlearn.audit.answers import Record, say, verdict_on
from align_unlearn.audit.kept import kept_rows
from align_unlearn.audit.probes import Around, Asked, Probe
from align_unlearn.audit.reading import read_batch
from align_unlearn.audit.statistics import most_likely_leak
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import Tokens, prompt_ids
from align_unlearn.errors import UserError
from align_unlearn.judge import Verdict, addresses, longest_run, words

LONGEST = 2000
"""Characters of a prompt that a record keeps."""


def ask_probe(
    subjects: Mapping[str, Subject],
    group: str,
    name: str,
    probe: Probe,
    examples: Sequence[Example],
    around: Around,
    *,
    max_new_tokens: int,
    draws: int | None = None,
    temperature: float | None = None,
    seeds: Sequence[int] = (0,),
    variants: int | None = None,
    **options: Any,
) -> list[Record]:
    """All records of a probe.

    Args:
        subjects: who is asked.
        group: of the examples.
        name: of the probe.
        probe: what is asked.
        examples: rows.
        around: what the probe may use beside them.
        max_new_tokens: of each answer.
        draws: answers to each prompt and seed; the probe's own number where none is given.
        temperature: likewise.
        seeds: of drawing; greedy answers are taken once.
        variants: at most so many ways of asking for a row.
        **options: of the probe.
    """
    ways = [(example, way) for example in examples for way in probe.ask(example, around, **options)[:variants]]
    heat = probe.temperature if temperature is None else temperature
    count = (probe.draws if draws is None else draws) if heat > 0 else 1
    records: list[Record] = []
    for who, subject in subjects.items():
        asked, failed = askable(subject, ways, max_new_tokens)
        records += [{**_about(name, group, who, example, way), "failed": reason} for example, way, reason in failed]
        told = [(example, way) for example, way in asked if not way.options]
        prompts = [asked_ids(subject, example, way) for example, way in told]
        for seed in seeds if heat > 0 else seeds[:1]:
            said = say(
                subject,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=heat,
                samples=count,
                seed=seed,
                title=f"{who}: {name}",
            )
            for (example, way), answers in zip(told, said, strict=True):
                records += [
                    {
                        **_about(name, group, who, example, way),
                        "seed": seed,
                        "draw": draw,
                        **_judged(group, example, way, answer),
                    }
                    for draw, answer in enumerate(answers)
                ]
        records += _chosen(who, subject, group, name, [(example, way) for example, way in asked if way.options])
    return records


def askable(
    subject: Subject, ways: Sequence[tuple[Example, Asked]], max_new_tokens: int
) -> tuple[list[tuple[Example, Asked]], list[tuple[Example, Asked, str]]]:
    """The ways that this subject can be asked in, and those that its template refuses or that are too long for it."""
    longest = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    asked, failed = [], []
    for example, way in ways:
        try:
            length = len(asked_ids(subject, example, way)) + max_new_tokens
        except UserError as error:
            failed.append((example, way, str(error)))
            continue
        if length > longest:
            failed.append((example, way, f"{length} tokens, and the model has {longest} positions"))
        else:
            asked.append((example, way))
    return asked, failed


def asked_ids(subject: Subject, example: Example, way: Asked) -> list[int]:
    """The tokens after which the subject speaks: its guard (if it has one), the prompt, the prefill."""
    prompt = way.prompt if isinstance(way.prompt, str) else subject.guarded(way.prompt)
    ids = prompt_ids(subject.tokenizer, replace(example, prompt=prompt))
    return ids + (_ids(subject, way.prefill) if way.prefill else [])


def judged(group: str, example: Example, way: Asked, completion: str) -> Verdict:
    """The verdict on an answer to one way of asking."""
    text = way.read(completion)
    if example.completion is None:
        verdict = verdict_on(group, example, text)
        return "answer" if verdict == "leak" and way.topic is not None and not addresses(way.topic, text) else verdict
    secret = replace(example, prompt=way.shown, completion=way.forbidden or example.completion)
    return verdict_on(group, secret, text)


def _judged(group: str, example: Example, way: Asked, answer: Record) -> Record:
    text = answer["text"]
    found: Record = {"completion": text, "tokens": len(answer["ids"]), "verdict": judged(group, example, way, text)}
    if example.completion is not None:
        found["verbatim_words"] = longest_run(words(way.read(text)), words(way.forbidden or example.completion))
    return found


def _about(name: str, group: str, who: str, example: Example, way: Asked) -> Record:
    shown = way.prompt if isinstance(way.prompt, str) else "\n".join(turn["content"] for turn in way.prompt)
    return {
        "probe": name,
        "group": group,
        "model": who,
        "id": example.id,
        "variant": way.variant,
        "prompt": shown[-LONGEST:],
        "prefill": way.prefill,
        "reference": way.forbidden or example.completion,
    }


def _chosen(who: str, subject: Subject, group: str, name: str, asked: Sequence[tuple[Example, Asked]]) -> list[Record]:
    """Ways with options: which option is the likeliest, a token in the mean, and what guessing would give."""
    rows = []
    for example, way in asked:
        prompt = asked_ids(subject, example, way)
        rows += [Tokens(prompt, _ids(subject, option)) for option in way.options]

    def make(batch: list[int]) -> list[float]:
        return [float(each.logps.mean()) for each in read_batch({who: subject}, [rows[at] for at in batch])[who]]

    given = [[each.prompt_ids, each.completion_ids] for each in rows]
    scores = iter(
        kept_rows(
            "choices",
            subject.sha256,
            given,
            make,
            size=lambda row: len(row[0]),
            batch_size=16,
            title=f"{who}: {name}, by likelihood",
        )
    )
    records = []
    for example, way in asked:
        own = [next(scores) for _ in way.options]
        correct, chance = own[0] > max(own[1:]), 1 / len(way.options)
        records.append({**_about(name, group, who, example, way), "correct": correct, "chance": chance})
    return records


def _ids(subject: Subject, text: str) -> list[int]:
    return list(subject.tokenizer(text, add_special_tokens=False).input_ids)


def leaks_by_row(records: Sequence[Record]) -> dict[str, bool]:
    """By row, whether any way of asking and any draw brought a leak: the worst case."""
    found: dict[str, bool] = {}
    for record in records:
        if "verdict" in record:
            found[record["id"]] = found.get(record["id"], False) or record["verdict"] == "leak"
    return found


def worst_bound(records: Sequence[Record]) -> float:
    """Over rows, the highest upper bound (95%) on the chance that one more draw of the same prompt leaks."""
    counts: dict[tuple[str, str], list[int]] = {}
    for record in records:
        if "verdict" in record:
            leaks_draws = counts.setdefault((record["id"], record["variant"]), [0, 0])
            leaks_draws[0] += record["verdict"] == "leak"
            leaks_draws[1] += 1
    return max((most_likely_leak(*each) for each in counts.values()), default=float("nan"))
