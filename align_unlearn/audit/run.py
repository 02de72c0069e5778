"""`run_audit`: a run, an export, an adapter or any causal LM, examined before and after by a suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align_unlearn.audit.answers import Record
from align_unlearn.audit.attacks import ATTACKS
from align_unlearn.audit.benchmarks import BENCHMARKS
from align_unlearn.audit.costs import Costs
from align_unlearn.audit.diagnosis import diagnose, worst_case
from align_unlearn.audit.examination import examine
from align_unlearn.audit.gates import check_rules, judge_gates, read_application
from align_unlearn.audit.membership import SCORES, membership
from align_unlearn.audit.metrics import METRICS, change_interval, measure
from align_unlearn.audit.open_questions import open_questions
from align_unlearn.audit.probes import PROBES
from align_unlearn.audit.second_judge import Judge, judged
from align_unlearn.audit.subjects import open_subjects, read_settings
from align_unlearn.audit.suite import Suite, read_suite
from align_unlearn.audit.worst_case import attack_metrics, leak_change, probe_metrics
from align_unlearn.config import Job
from align_unlearn.data.examples import Example, read_examples
from align_unlearn.errors import UserError
from align_unlearn.files import write_json, write_json_lines
from align_unlearn.run_dir import SCHEMA_VERSION, read_manifest, versions


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
        lines = [f"{'metric':<32}{'before':>9}{'after':>9}   95% interval        rows"]
        for each in self.summary["metrics"]:
            before, after, low, high = (_say(each[key]) for key in ("base", "candidate", "low", "high"))
            lines.append(f"{each['name']:<32}{before:>9}{after:>9}   {low + ' to ' + high:<18}{each['n']:>6}")
        for gate in self.summary["gates"]:
            verdict = {True: "passed", False: "FAILED", None: "not measured"}[gate["passed"]]
            lines.append(f"gate {gate['name']} {gate['rule']}: {_say(gate['value'])}, {verdict}")
        diagnosis = self.summary["diagnosis"]
        lines.append(f"{diagnosis['state']}: {'; '.join(diagnosis['because'])}")
        if worst := self.summary["worst"]:
            lines.append(f"worst case: {worst['name']} {_say(worst['candidate'])} ({worst['budget']})")
        return "\n".join(lines)


def run_audit(
    target: str | Path,
    *,
    suite: str = "direct",
    out: str | Path | None = None,
    base: str | None = None,
    guard: str | None = None,
    application: str | None = None,
    judge: Judge | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
    **overrides: Any,
) -> Audit:
    """Examines a model and writes `audit.json` and `records.jsonl`.

    Args:
        target: a run folder, a folder that `merge` wrote, an adapter of PEFT, or any causal LM.
        suite: which probes and attacks: a shipped suite, or a YAML file (`suite.py`).
        out: where to write; `TARGET/audit` where none is given (`TARGET/audit-SUITE` for other suites than `direct`).
        base: what the target was made from, where the target does not say it itself.
        guard: a system prompt that the candidate's deployment puts before every conversation.
        application: whose gates are judged beside the recipe's: copyright, privacy, harm, or a YAML file.
        judge: a model of text that scores the plain answers beside the rules (`forget.judge`, `neighbours.judge`).
        trust_remote_code: run code that comes with the models.
        say: called with a line for each stage.
        **overrides: keys of `Job` in place of the recipe's (`audit_forget`, `audit_control`, `gates`, …).

    Raises:
        UserError: the target, its base or its data cannot be read, or a gate cannot be judged.
    """
    asked = read_suite(suite)
    recipe = (Path(target) / "recipe.yaml").is_file()
    job = read_settings(target)[0] if recipe else Job()
    for name, value in overrides.items():
        setattr(job, name, value)
    if asked.tokens:
        job = replace(job, audit_tokens=asked.tokens)
    control = bool(job.audit_control)
    own: dict[str, str] = job.gates or {}  # type: ignore[assignment]
    check_rules(own, metric_names(asked), control=control)
    rules, why = read_application(application) if application else ({}, {})
    check_rules(rules, metric_names(None), control=True)
    folder = Path(out) if out else default_folder(target, asked)
    say(f"auditing {target} with the suite {asked.name}: {asked.about}")
    costs = Costs()
    with costs.stage("loading"):
        subjects = open_subjects(target, job.audit_control, base=base, guard=guard, trust_remote_code=trust_remote_code)
        sets = audited_sets(job, subjects["base"].tokenizer, asked)
    records = examine(subjects, sets, job, asked, costs, say)
    if judge is not None:
        with costs.stage("judge"):
            records = judged(records, judge)
    write_json_lines(folder / "records.jsonl", records)
    with costs.stage("statistics"):
        metrics = [*measure(records), *probe_metrics(records), *membership(records), *attack_metrics(records),
                   *(metric for name in asked.benchmarks for metric in BENCHMARKS[name].metrics(records))]  # fmt: skip
        gates = judge_gates(rules | own, metrics, lambda *change: _change(records, *change), why)
    manifest = read_manifest(Path(target)) if recipe else {}
    summary = {
        "schema_version": SCHEMA_VERSION,
        "suite": asked.name,
        "settings": asked.described() | {"tokens": job.audit_tokens},
        "application": application,
        "base": subjects["base"].described(),
        "candidate": subjects["candidate"].described(),
        "control": subjects["control"].described() if control else None,
        "manifest": manifest,
        "seed": 0,
        "metrics": metrics,
        "gates": gates,
        "passed": not any(gate["passed"] is False for gate in gates),
        "unmeasured": [gate["name"] for gate in gates if gate["passed"] is None],
        "diagnosis": diagnose(metrics),
        "worst": worst_case(metrics),
        "failures": [_failure(each) for each in records if "failed" in each],
        "open_questions": open_questions(subjects, sets, asked, manifest),
        "costs": costs.described(sum(each.get("tokens", 0) for each in records if "completion" in each)),
        "libraries": versions(),
    }
    write_json(folder / "audit.json", summary)
    return Audit(summary, records, folder)


def default_folder(target: str | Path, suite: Suite) -> Path:
    """Beside the model where it is a folder of its own, else under `audits/`."""
    name = "audit" if suite.name == "direct" else f"audit-{suite.name}"
    place = Path(target)
    return place / name if place.is_dir() else Path("audits") / f"{place.name}-{suite.name}"


def metric_names(suite: Suite | None) -> list[str]:
    """The metrics that a suite can give; all that there are, where none is named."""
    probes = PROBES if suite is None else suite.probes
    attacks = ATTACKS if suite is None else suite.attacks
    names = [*METRICS, *(f"forget.leak.{probe}" for probe in probes if probe != "choices")]
    names += [f"membership.{kind}_{score}" for kind in ("auc", "tpr") for score in [*SCORES, "reference"]]
    names += ["membership.privleak", "forget.accuracy.choices"]
    names += [f"attack.{attack}.{figure}" for attack in attacks for figure in ("leak", "probability", "score")]
    benchmarks = {} if suite is None else suite.benchmarks
    return names + [metric for name, given in benchmarks.items() for metric in BENCHMARKS[name].names(given)]


def _change(records: list[Record], name: str, other: str, factor: float) -> tuple[float, float]:
    if name in METRICS:
        return change_interval(records, name, other, factor)
    if name.startswith("forget.leak."):
        return leak_change(records, name, other, factor)
    raise UserError(
        f"A rule on {name} cannot stand beside the {other}'s figure.", where=f"gates: {name}", fix="a plain bound"
    )


def _failure(record: Record) -> dict[str, str]:
    return {key: str(record.get(key, "")) for key in ("probe", "variant", "group", "model", "id", "failed")}


def _say(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def audited_sets(job: Job, tokenizer: Any, suite: Suite | None = None) -> dict[str, list[Example]]:
    """The audited rows by group: held-out sets where the recipe names them, else what it trained on.

    Raises:
        UserError: there is nothing to forget, or a set cannot be read.
    """
    sources = {
        "forget": job.audit_forget or job.forget_dataset,
        "neighbours": job.audit_neighbours,
        "retain": job.audit_retain or job.retain_dataset,
        "holdout": job.audit_holdout,
    }
    if suite is not None:
        sources |= {group: source for group, source in suite.sources.items() if not getattr(job, f"audit_{group}")}
    if not sources["forget"] and not (suite is not None and suite.benchmarks and not suite.probes):
        raise UserError("No forget set is named.", where="audit_forget")
    sets = {}
    for group, source in sources.items():
        if source:
            rows = read_examples(
                source, tokenizer, prefix_tokens=job.prefix_tokens, continuation_tokens=job.continuation_tokens
            )
            most = [each for each in (job.audit_limit, suite.rows.get(group) if suite else None) if each]
            sets[group] = rows[: min(most, default=None)]
            if suite is not None and suite.chat:
                sets[group] = [as_chat(example) for example in sets[group]]
    return sets


def as_chat(example: Example) -> Example:
    """A prompt of plain text as a message: benchmarks of requests call their column `prompt`."""
    if isinstance(example.prompt, str):
        return replace(example, prompt=[{"role": "user", "content": example.prompt}])
    return example
