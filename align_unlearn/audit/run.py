"""`run_audit`: a run or an exported folder, examined on held-out rows, before and after in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_unlearn.audit.answers import Record, answers
from align_unlearn.audit.gates import check_rules, judge_gates
from align_unlearn.audit.likelihood import given_texts, likelihood
from align_unlearn.audit.metrics import METRICS, measure
from align_unlearn.audit.subjects import Subject, open_subjects, read_settings
from align_unlearn.config import Job
from align_unlearn.data.examples import Example, read_examples
from align_unlearn.errors import UserError, unknown_name
from align_unlearn.files import write_json, write_json_lines
from align_unlearn.run_dir import SCHEMA_VERSION, read_manifest, versions

SUITES = {"first": "direct prompts, greedy answers; likelihood and drift on given texts"}


@dataclass(frozen=True)
class Audit:
    """What an audit found, and where it was written."""

    summary: dict[str, Any]
    records: list[Record]
    folder: Path

    @property
    def passed(self) -> bool:
        """Whether every gate was passed."""
        return bool(self.summary["passed"])

    def table(self) -> str:
        """The metrics and gates as lines of text."""
        lines = [f"{'metric':<22}{'before':>9}{'after':>9}   95% interval        rows"]
        for each in self.summary["metrics"]:
            before, after, low, high = (f"{each[key]:.3f}" for key in ("base", "candidate", "low", "high"))
            lines.append(f"{each['name']:<22}{before:>9}{after:>9}   {low + ' to ' + high:<18}{each['n']:>6}")
        for gate in self.summary["gates"]:
            verdict = "passed" if gate["passed"] else "FAILED"
            lines.append(f"gate {gate['name']} {gate['rule']}: {gate['value']:.3f}, {verdict}")
        return "\n".join(lines)


def run_audit(
    target: str | Path,
    *,
    suite: str = "first",
    out: str | Path | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
    **overrides: Any,
) -> Audit:
    """Examines a run or an exported folder and writes `audit.json` and `records.jsonl`.

    Args:
        target: a run folder, or a folder that `merge` wrote.
        suite: which probes; a name of `SUITES`.
        out: where to write; `TARGET/audit` where none is given.
        trust_remote_code: run code that comes with the models.
        say: called with a line for each stage.
        **overrides: keys of `Job` in place of the recipe's (`audit_forget`, `gates`, …).

    Raises:
        UserError: the target is neither, or its data cannot be read.
    """
    if suite not in SUITES:
        raise unknown_name("suite", suite, SUITES, where="--suite")
    job, _ = read_settings(target)
    for name, value in overrides.items():
        setattr(job, name, value)
    check_rules(job.gates or {}, METRICS, control=bool(job.audit_control))  # type: ignore[arg-type]
    say(f"auditing {target}")
    subjects = open_subjects(target, job.audit_control, trust_remote_code=trust_remote_code)
    tokenizer = subjects["base"].tokenizer
    sets = audited_sets(job, tokenizer)
    records = examine(subjects, sets, job)
    folder = Path(out) if out else Path(target) / "audit"
    write_json_lines(folder / "records.jsonl", records)
    metrics = measure(records)
    gates = judge_gates(job.gates or {}, metrics)  # type: ignore[arg-type]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "suite": suite,
        "base": subjects["base"].described(),
        "candidate": subjects["candidate"].described(),
        "control": subjects["control"].described() if "control" in subjects else None,
        "seed": 0,
        "metrics": metrics,
        "gates": gates,
        "passed": all(gate["passed"] for gate in gates),
        "open_questions": open_questions(subjects, sets, read_manifest(Path(target))),
        "libraries": versions(),
    }
    write_json(folder / "audit.json", summary)
    return Audit(summary, records, folder)


def audited_sets(job: Job, tokenizer: Any) -> dict[str, list[Example]]:
    """The audited rows by group: held-out sets where the recipe names them, else what it trained on.

    Raises:
        UserError: there is nothing to forget, or a set cannot be read.
    """
    sources = {
        "forget": job.audit_forget or job.forget_dataset,
        "neighbours": job.audit_neighbours,
        "retain": job.audit_retain or job.retain_dataset,
    }
    if not sources["forget"]:
        raise UserError("No forget set is named.", where="audit_forget")
    sets = {}
    for group, source in sources.items():
        if source:
            rows = read_examples(
                source, tokenizer, prefix_tokens=job.prefix_tokens, continuation_tokens=job.continuation_tokens
            )
            sets[group] = rows[: job.audit_limit]
    return sets


def examine(subjects: dict[str, Subject], sets: dict[str, list[Example]], job: Job) -> list[Record]:
    """All records of an audit: answers of every group, likelihood where there is a text to measure it on."""
    tokenizer = subjects["base"].tokenizer
    records: list[Record] = []
    for group, examples in sets.items():
        answered = answers(subjects, group, examples, max_new_tokens=job.audit_tokens)
        records += answered
        if group != "neighbours":
            records += likelihood(subjects, group, given_texts(examples, answered, tokenizer))
    return records


def open_questions(subjects: dict[str, Subject], sets: dict[str, list[Example]], manifest: dict[str, Any]) -> list[str]:
    """What this audit does not answer, in words for the page."""
    questions = [
        "Prompts were asked directly and answered greedily: paraphrase, jailbreak, sampling, relearning, quantisation "
        "and pruning were not tried."
    ]
    if "control" not in subjects:
        questions.append(
            "There is no model that never saw the forget set to compare with, so it is not known what such a model "
            "would have said."
        )
    if manifest.get("retain") == "none":
        questions.append("The run had no retain term: nothing held the model near the original.")
    if "retain" not in sets:
        questions.append("No retain set was audited: what the run cost elsewhere was not measured.")
    if "neighbours" not in sets:
        questions.append("No benign look-alikes were audited: over-refusal was not measured.")
    return questions
