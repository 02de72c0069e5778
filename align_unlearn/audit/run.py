"""`run_audit`: a run, an export, an adapter or any causal LM, examined before and after by a suite."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align_unlearn.audit.answers import Record
from align_unlearn.audit.attacks import ATTACKS
from align_unlearn.audit.benchmarks import BENCHMARKS
from align_unlearn.audit.costs import Costs
from align_unlearn.audit.diagnosis import diagnose, worst_case
from align_unlearn.audit.earlier import earlier_runs, requests_of
from align_unlearn.audit.examination import examine
from align_unlearn.audit.gates import check_rules, judge_gates, read_application
from align_unlearn.audit.membership import SCORES, membership
from align_unlearn.audit.metrics import METRICS, change_interval, measure
from align_unlearn.audit.open_questions import open_questions
from align_unlearn.audit.probes import PROBES
from align_unlearn.audit.second_judge import Judge, judged
from align_unlearn.audit.sets import audited_sets, check_lengths, check_sources, described_sets
from align_unlearn.audit.subjects import open_subjects, read_settings
from align_unlearn.audit.suite import Suite, read_suite
from align_unlearn.audit.worst_case import attack_metrics, leak_change, probe_metrics
from align_unlearn.config import Job
from align_unlearn.errors import UserError, unknown_name
from align_unlearn.files import check_folder, write_json, write_json_lines
from align_unlearn.run_dir import SCHEMA_VERSION, read_manifest, versions


@dataclass(frozen=True)
class Audit:
    """What an audit found, and where it was written.

    Attributes:
        summary: what `audit.json` holds.
        records: what `records.jsonl` holds.
        folder: where both were written.
        earlier: audits of the requests of earlier runs that the model stands on, by name.
    """

    summary: dict[str, Any]
    records: list[Record]
    folder: Path
    earlier: dict[str, Audit] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no gate failed, of earlier requests neither. Some may not have been measured."""
        return bool(self.summary["passed"])

    @property
    def unmeasured(self) -> list[str]:
        """The gates that could not be judged, and earlier requests that could not be asked about."""
        return list(self.summary["unmeasured"])

    def verdict(self) -> dict[str, Any]:
        """What the page of a later request says of this one."""
        told = ("request", "passed", "unmeasured", "diagnosis", "worst")
        return {name: self.summary[name] for name in told} | {"gates": len(self.summary["gates"])}

    def table(self) -> str:
        """The metrics and gates as lines of text."""
        lines = [f"{'metric':<32}{'before':>9}{'after':>9}   95% interval        rows"]
        for each in self.summary["metrics"]:
            before, after, low, high = (_say(each[key]) for key in ("base", "candidate", "low", "high"))
            lines.append(f"{each['name']:<32}{before:>9}{after:>9}   {low + ' to ' + high:<18}{each['n']:>6}")
        for gate in self.summary["gates"]:
            verdict = {True: "passed", False: "FAILED", None: "NOT MEASURED"}[gate["passed"]]
            lines.append(f"gate {gate['name']} {gate['rule']}: {_say(gate['value'])}, {verdict}")
        diagnosis = self.summary["diagnosis"]
        lines.append(f"{diagnosis['state']}: {'; '.join(diagnosis['because'])}")
        if worst := self.summary["worst"]:
            lines.append(f"worst case: {worst['name']} {_say(worst['candidate'])} ({worst['budget']})")
        for name, own in self.earlier.items():
            lines.append(f"\nthe earlier request {name}\n{own.table()}")
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

    A model that stands on earlier runs is asked about their requests too, each in a folder of its own under `earlier/`.

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
    options = Options(suite, guard, application, judge, trust_remote_code, say)
    own = _question(target, None, Path(out) if out else None, options, overrides)
    if own.manifest and base:
        raise UserError("The folder says itself what it was made from.", where="--base", fix="leave --base out")
    limit = {name: value for name, value in overrides.items() if name == "audit_limit"}
    questions = {
        name: None if run is None else _question(target, run, own.folder / "earlier" / name, options, limit)
        for name, run in requests_of(earlier_runs(target) if own.suite.of_requests else []).items()
    }
    earlier: dict[str, Audit | None] = {}
    for name, question in questions.items():  # the model's own page comes last, with what they found on it
        earlier[name] = None if question is None else _audited(question, options, None, {})
        if question is None:
            say(f"the request of the earlier adapter {name} is not asked: it lies in no run")
    return _audited(own, options, base, earlier)


@dataclass(frozen=True)
class Options:
    """How a model is asked, whatever the request; as `run_audit` takes them."""

    suite: str
    guard: str | None
    application: str | None
    judge: Judge | None
    trust_remote_code: bool
    say: Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """What a model is asked about: its own request, or that of a run beneath it.

    Of an earlier request only what was to be forgotten is asked and judged: what was kept then may be what a later
    request is about.
    """

    target: str | Path
    request: Path | None
    suite: Suite
    job: Job
    manifest: dict[str, Any]
    rules: list[tuple[str, dict[str, str], dict[str, str]]]
    folder: Path


ABOUT_FORGETTING = ("forget.", "membership.", "attack.")
"""Beginnings of the metrics that an earlier request is judged by."""


def _question(
    target: str | Path, request: Path | None, out: Path | None, options: Options, overrides: dict[str, Any]
) -> Question:
    """A question with everything read that can be read before a model is loaded.

    Raises:
        UserError: as `run_audit`.
    """
    suite = read_suite(options.suite)
    job, manifest = _settings(target)
    if request is not None:
        job, suite = _settings(request)[0], replace(suite, benchmarks={})
    if strangers := overrides.keys() - vars(job).keys():
        raise unknown_name("key", sorted(strangers)[0], vars(job), where="run_audit")
    job = replace(job, **overrides)
    rules = _rules(job, suite, options.application)
    if request is not None:
        rules = [(origin, {name: rule for name, rule in own.items() if name.startswith(ABOUT_FORGETTING)}, why)
                 for origin, own, why in rules]  # fmt: skip
    folder = out or default_folder(target, suite)
    check_folder(folder)
    check_sources(job, suite)
    return Question(target, request, suite, job, manifest, rules, folder)


def _audited(question: Question, options: Options, base: str | None, earlier: dict[str, Audit | None]) -> Audit:
    """One request's audit, written, with what was found of earlier ones."""
    suite, job, folder, say = question.suite, question.job, question.folder, options.say
    of = "" if question.request is None else f", the earlier request {question.request}"
    say(f"auditing {question.target}{of} with the suite {suite.name}: {suite.about}")
    costs = Costs()
    with costs.stage("loading"):
        subjects = open_subjects(
            question.target, job.audit_control, base=base, guard=options.guard, request=question.request,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        sets = audited_sets(job, subjects["base"].tokenizer, suite)
        if question.request is not None:
            sets = {group: rows for group, rows in sets.items() if group in ("forget", "holdout")}
        check_lengths(sets, subjects["candidate"], job, suite)
    records = examine(subjects, sets, job, suite, costs, say)
    if options.judge is not None:
        with costs.stage("judge"):
            records = judged(records, options.judge)
    write_json_lines(folder / "records.jsonl", records)
    with costs.stage("statistics"):
        metrics = all_metrics(records, suite)
        gates = [
            {**gate, "of": origin}
            for origin, own, why in question.rules
            for gate in judge_gates(own, metrics, lambda *change: _change(records, *change), why)
        ]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "suite": suite.name,
        "settings": suite.described()
        | {"tokens": suite.tokens or job.audit_tokens, "limit": job.audit_limit, "forget_answers": job.forget_answers},
        "data": described_sets(job, suite, sets),
        "application": options.application,
        "guard": options.guard,
        "judge": None if options.judge is None else type(options.judge).__name__,
        "request": None if question.request is None else str(question.request),
        "earlier": {name: None if each is None else each.verdict() for name, each in earlier.items()},
        "base": subjects["base"].described(),
        "candidate": subjects["candidate"].described(),
        "control": subjects["control"].described() if job.audit_control else None,
        "manifest": question.manifest,
        "seed": 0,
        "metrics": metrics,
        "gates": gates,
        **_all_requests(gates, earlier),
        "diagnosis": diagnose(metrics, guarded=bool(options.guard)),
        "worst": worst_case(metrics),
        "failures": [_failure(each) for each in records if "failed" in each],
        "open_questions": open_questions(subjects, sets, suite, question.manifest, records),
        "costs": costs.described(sum(each.get("tokens", 0) for each in records if "completion" in each)),
        "libraries": versions(),
    }
    write_json(folder / "audit.json", summary)
    return Audit(summary, records, folder, {name: each for name, each in earlier.items() if each is not None})


def _all_requests(gates: list[dict[str, Any]], earlier: dict[str, Audit | None]) -> dict[str, Any]:
    """Whether no gate failed, and what was not measured, earlier requests included."""
    unmeasured = [gate["name"] for gate in gates if gate["passed"] is None]
    passed = not any(gate["passed"] is False for gate in gates)
    for name, each in earlier.items():
        passed = passed and (each is None or each.passed)
        unmeasured += [f"earlier request {name}"] if each is None else [f"{name}: {gate}" for gate in each.unmeasured]
    return {"passed": passed, "unmeasured": unmeasured}


def check_gates(job: Job) -> None:
    """Refuses a recipe's gates that the audit right after its run could not judge, before the run is spent.

    Raises:
        UserError: a rule cannot be read, names a metric that there is not, or needs a control that is not named.
    """
    _rules(job, read_suite("direct"), None)


def _rules(job: Job, suite: Suite, application: str | None) -> list[tuple[str, dict[str, str], dict[str, str]]]:
    """By origin, the gates to be judged and why they are.

    Raises:
        UserError: one names a metric that no suite gives, or needs a control that there is not.
    """
    own: dict[str, str] = job.gates or {}  # type: ignore[assignment]
    rules: list[tuple[str, dict[str, str], dict[str, str]]] = [("recipe", own, {})]
    if application:
        rules.insert(0, (application, *read_application(application)))
    for origin, each, _ in rules:
        known = {*metric_names(suite), *metric_names(None)}
        check_rules(each, known, control=bool(job.audit_control) or origin != "recipe")
    return rules


def all_metrics(records: list[Record], suite: Suite) -> list[dict[str, Any]]:
    """Every metric that the records allow; a figure that is no number is none, and failed rows are counted."""
    metrics = [*measure(records), *probe_metrics(records), *membership(records), *attack_metrics(records)]
    metrics += [metric for name in suite.benchmarks for metric in BENCHMARKS[name].metrics(records)]
    failed = Counter(
        (each.get("attack", each["probe"]), each["group"]) for each in records
        if "failed" in each and each["model"] == "candidate"
    )  # fmt: skip
    return [_numbers({**metric, "failed": failed[_asked_by(metric)]}) for metric in metrics]


def _asked_by(metric: dict[str, Any]) -> tuple[str, str]:
    """The probe or attack, and the group, whose failures speak against a metric."""
    name = metric["name"]
    if name in METRICS:
        return METRICS[name].probe, name.partition(".")[0]
    group = "forget" if metric["group"] in ("probe", "attack", "membership") else metric["group"]
    if name.startswith("membership."):
        return "likelihood", group
    return (name.split(".")[1] if name.startswith("attack.") else name.rpartition(".")[2]), group


def _numbers(value: Any) -> Any:
    """The value with none in the place of every float that is no number: JSON has no word for those."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    return [_numbers(each) for each in value] if isinstance(value, list) else value


def _settings(target: str | Path) -> tuple[Job, dict[str, Any]]:
    """The recipe and the manifest of a run or an export of ours; defaults and nothing for any other model.

    Raises:
        UserError: the folder is a reward model's, or not there.
    """
    place = Path(target)
    if not place.exists() and (place.is_absolute() or str(target).startswith(".") or place.parent.is_dir() != (
            str(place.parent) == ".")):  # fmt: skip
        raise UserError("There is no such folder.", where=str(target), fix="check the path")
    if not ((place / "recipe.yaml").is_file() and (place / "manifest.json").is_file()):
        return Job(), {}
    manifest = read_manifest(place)
    if manifest.get("kind") not in ("run", "export"):
        raise UserError(f"This is the folder of a {manifest.get('kind')}, not of a model.", where=str(target))
    return read_settings(place)[0], manifest


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


def _change(records: list[Record], name: str, other: str, factor: float) -> tuple[float, float] | None:
    """The interval of candidate − factor · other, rows paired; none where the metric is not a mean over rows."""
    if name in METRICS:
        return change_interval(records, name, other, factor)
    return leak_change(records, name, other, factor) if name.startswith("forget.leak.") else None


def _failure(record: Record) -> dict[str, str]:
    return {
        key: str(record.get(key, ""))
        for key in ("probe", "attack", "variant", "setting", "group", "model", "id", "failed")
    }


def _say(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
