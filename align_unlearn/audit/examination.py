"""What a suite asks, stage by stage: answers and likelihood of every group, then probes, then attacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from align_unlearn.audit.answers import Record, answers, finite
from align_unlearn.audit.asking import ask_probe
from align_unlearn.audit.attacks import ATTACKS, Bench
from align_unlearn.audit.benchmarks import BENCHMARKS, Limits, spread
from align_unlearn.audit.costs import Costs
from align_unlearn.audit.kept import Kept
from align_unlearn.audit.likelihood import given_texts, likelihood
from align_unlearn.audit.probes import PROBES, Around
from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.suite import Suite
from align_unlearn.config import Job
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import Tokens
from align_unlearn.errors import UserError
from align_unlearn.files import sha256_of

Texts = list[tuple[Example, Tokens]]
ATTACK_CODE = 1
"""Counted up when an attack's outcome changes, so that what was kept of the old one is not taken for the new one's."""


def examine(
    subjects: dict[str, Subject],
    sets: dict[str, list[Example]],
    job: Job,
    suite: Suite,
    costs: Costs,
    say: Callable[[str], None],
) -> list[Record]:
    """All records of an audit."""
    records: list[Record] = []
    texts: dict[str, Texts] = {}
    for group, examples in sets.items():
        with costs.stage("answers"):
            answered = answers(subjects, group, examples, max_new_tokens=job.audit_tokens) if group != "holdout" else []
        records += answered
        with costs.stage("likelihood"):
            texts[group] = given_texts(examples, answered, subjects["base"].tokenizer)
            if group != "neighbours":
                records += likelihood(subjects, group, texts[group])
    around = Around(
        forget=sets.get("forget", []),
        kept=sets.get("retain", []),
        chat=bool(subjects["base"].tokenizer.chat_template),
    )
    for name, options in suite.probes.items():
        say(f"probe {name}: {PROBES[name].about}")
        rows = spread(sets.get("forget", []), options.get("rows"))
        settings = {key: value for key, value in options.items() if key != "rows"}
        with costs.stage(f"probe {name}"):
            records += ask_probe(
                subjects, "forget", name, PROBES[name], rows, around, max_new_tokens=job.audit_tokens, **settings
            )
    for name, options in suite.attacks.items():
        with costs.stage(f"attack {name}"):
            records += attacked(subjects, name, options, texts, sets, job, say)
    limits = Limits(suite.rows.get("benchmarks"), job.audit_tokens)
    for name, options in suite.benchmarks.items():
        say(f"benchmark {name}")
        with costs.stage(f"benchmark {name}"):
            records += BENCHMARKS[name].ask(subjects, options, limits)
    return records


def attacked(
    subjects: Mapping[str, Subject],
    name: str,
    options: Mapping[str, Any],
    texts: Mapping[str, Texts],
    sets: Mapping[str, list[Example]],
    job: Job,
    say: Callable[[str], None],
) -> list[Record]:
    """An attack on the candidate, and on the control (the base where there is none): kept whole once it is done."""
    forget = spread(texts["forget"], options.get("rows"))
    settings = {key: value for key, value in options.items() if key != "rows"}
    bench = Bench(
        forget=forget,
        kept=texts.get("retain", []),
        benign=sets.get("neighbours") or sets.get("retain", []),
        base=subjects["base"],
        max_new_tokens=job.audit_tokens,
    )
    given = [[tokens.input_ids for _, tokens in rows] for rows in (bench.forget, bench.kept)]
    key = sha256_of([given, [each.prompt for each in bench.benign]])
    records: list[Record] = []
    for who in ("candidate", "control" if "control" in subjects else "base"):
        subject = subjects[who]
        maker = [ATTACK_CODE, subject.sha256, subjects["base"].sha256, who, name, settings, job.audit_tokens]
        kept = Kept("attacks", maker)
        if key not in kept.found:
            say(f"attack {name} on the {who}")
            kept.add({key: json.dumps(_tried(name, subject, bench, settings))})
        records += json.loads(kept.found[key])
    return records


def _tried(name: str, subject: Subject, bench: Bench, settings: Mapping[str, Any]) -> list[Record]:
    """An attack's records; where it cannot be made on this model, one that says so."""
    try:
        records = ATTACKS[name](name, subject, bench, **settings)
    except UserError as error:
        return [{"probe": "attack", "attack": name, "group": "forget", "model": subject.name, "failed": str(error)}]
    return [finite(record) for record in records]
