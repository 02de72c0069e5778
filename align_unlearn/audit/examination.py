"""What a suite asks, stage by stage: answers and likelihood of every group, then probes, then attacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align_unlearn import judge
from align_unlearn.audit.answers import Record, answers, finite
from align_unlearn.audit.asking import ask_probe
from align_unlearn.audit.attacks import ATTACKS, Bench
from align_unlearn.audit.benchmarks import BENCHMARKS, Limits, spread
from align_unlearn.audit.costs import Costs
from align_unlearn.audit.kept import Kept
from align_unlearn.audit.likelihood import given_texts, likelihood
from align_unlearn.audit.probes import PROBES, Around
from align_unlearn.audit.sets import answer_tokens
from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.suite import Suite
from align_unlearn.config import Job
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import Tokens
from align_unlearn.errors import UserError
from align_unlearn.files import sha256_of, sha256_of_file

Texts = list[tuple[Example, Tokens]]
ATTACK_CODE = 2
"""Counted up when an attack's outcome changes, so that what was kept of the old one is not taken for the new one's."""
JUDGE_CODE = sha256_of_file(Path(judge.__file__))
"""Attacks are kept with their verdicts, which are those of these rules."""


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
    tokens = suite.tokens or job.audit_tokens
    texts: dict[str, Texts] = {}
    for group, examples in sets.items():
        with costs.stage("answers"):
            most = answer_tokens(examples, job, suite)
            answered = answers(subjects, group, examples, max_new_tokens=most) if group != "holdout" else []
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
                subjects,
                "forget",
                name,
                PROBES[name],
                rows,
                around,
                max_new_tokens=tokens,
                **settings,
            )
    for name, options in suite.attacks.items():
        with costs.stage(f"attack {name}"):
            records += attacked(subjects, name, options, texts, sets, tokens, say)
    limits = Limits(suite.rows.get("benchmarks"), tokens)
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
    max_new_tokens: int,
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
        max_new_tokens=max_new_tokens,
    )
    given = [
        [[example.id, example.completion, tokens.prompt_ids, tokens.completion_ids] for example, tokens in rows]
        for rows in (bench.forget, bench.kept)
    ]
    key = sha256_of([given, [each.prompt for each in bench.benign]])
    records: list[Record] = []
    for who in ("candidate", "control" if "control" in subjects else "base"):
        subject = subjects[who]
        maker = [
            ATTACK_CODE,
            JUDGE_CODE,
            subject.sha256,
            subjects["base"].sha256,
            who,
            name,
            settings,
            max_new_tokens,
        ]
        kept = Kept("attacks", maker)
        if key in kept.found:
            records += json.loads(kept.found[key])
            continue
        say(f"attack {name} on the {who}")
        found = _tried(name, subject, bench, settings)
        if not any("failed" in each and "setting" not in each for each in found):
            kept.add({key: json.dumps(found)})
        records += found
    return records


def _tried(name: str, subject: Subject, bench: Bench, settings: Mapping[str, Any]) -> list[Record]:
    """An attack's records; where it cannot be made on this model, one that says so."""
    try:
        records = ATTACKS[name](name, subject, bench, **settings)
    except (UserError, RuntimeError, ValueError) as error:  # out of memory, states that are no numbers
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [{"probe": "attack", "attack": name, "group": "forget", "model": subject.name, "failed": why}]
    return [finite(record) for record in records]
