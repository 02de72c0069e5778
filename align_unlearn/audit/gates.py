"""Gates: the rules that a recipe says an audit must pass.

A rule is `<=` or `>=` and a bound: a number (`<= 0.10`, `>= -0.5`), a number beside the base's or the control's figure
(`<= base + 0.10`, `>= base - 0.05`), or a multiple of it (`>= 0.9 * base`). What is held to it is the worse end of the
metric's interval (of the paired change from the base or the control, where the rule speaks of one): a gate that few
rows pass by luck is not passed. `point <= 0.10` holds the figure itself to the bound, for a demonstration on few rows.
`METRIC@base` holds the base's own figure to a rule: a precondition without which the others say nothing (that there was
something to forget).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_unlearn.config import read_recipe
from align_unlearn.errors import UserError, unknown_name

APPLICATIONS = Path(__file__).parent / "applications"
_NUMBER = r"\d+(?:\.\d+)?"
_RULE = re.compile(
    rf"^(?P<point>point\s+)?(?P<sign><=|>=)\s*(?:(?P<number>-?{_NUMBER})"
    rf"|(?P<other>base|control)(?:\s*(?P<plus>[+-]\s*{_NUMBER}))?"
    rf"|(?P<factor>{_NUMBER})\s*\*\s*(?P<scaled>base|control))$"
)


Change = Callable[[str, str, float], "tuple[float, float] | None"]
TARGETS = {"zero": 0.0, "half": 0.5}
"""Metrics that are to be near a value: being far below it tells as much as being far above."""
FEWEST = 5
"""On fewer rows an interval says nothing, and a gate that is judged on one is not measured."""


@dataclass(frozen=True)
class Rule:
    """A rule that was read: the sign, what it stands beside, and the bound `factor · other + plus`."""

    point: bool
    sign: str
    other: str | None
    factor: float
    plus: float

    def bound(self, metric: Mapping[str, Any]) -> float:
        """The bound in figures."""
        return self.plus + (self.factor * metric[self.other] if self.other else 0.0)


def judge_gates(
    rules: Mapping[str, str], metrics: list[dict[str, Any]], change: Change, why: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Each rule with the figure it was held against and whether it passed; `passed` is none where nothing was measured.

    Args:
        rules: by metric.
        metrics: of the audit.
        change: (metric, `base` or `control`, factor) → the interval of candidate − factor · other, paired by row.
        why: the reason for a rule, by metric.

    Raises:
        UserError: a rule that cannot be read.
    """
    known = {metric["name"]: metric for metric in metrics}
    gates = []
    for name, text in rules.items():
        metric, _, who = name.partition("@")
        gate: dict[str, Any] = {"name": name, "rule": text, "why": (why or {}).get(name)}
        found = known.get(metric)
        if found is None or not _can_be_judged(found, who, text):
            figure = None if found is None else found[who or "candidate"]
            gates.append({**gate, "bound": None, "figure": figure, "value": None, "passed": None})
            continue
        rule = read_rule(name, text, found)
        bound = rule.bound(found)
        value = found[who] if who else judged_value(found, rule, change)
        passed = value <= bound if rule.sign == "<=" else value >= bound
        gates.append(
            {**gate, "bound": bound, "figure": found[who or "candidate"], "value": value, "passed": bool(passed)}
        )
    return gates


def _can_be_judged(metric: Mapping[str, Any], who: str, text: str) -> bool:
    """Whether there is a figure, enough rows, no failed ones, and the other model that the rule speaks of."""
    match = _RULE.match(text.strip())
    other = match and (match["other"] or match["scaled"])
    if metric[who or "candidate"] is None or (other and metric[other] is None):
        return False
    if who or (match and match["point"]):
        return True
    return metric["n"] >= FEWEST and not metric.get("failed")


def judged_value(metric: Mapping[str, Any], rule: Rule, change: Change) -> float:
    """The end of the interval that speaks against the candidate; the figure itself for `point` rules."""
    figure = float(metric["candidate"])
    if metric.get("better") in TARGETS and rule.sign == "<=" and rule.other is None:
        target = TARGETS[metric["better"]]
        ends = [figure] if rule.point or metric.get("low") is None else [metric["low"], metric["high"]]
        return float(target + max(abs(end - target) for end in ends))
    if rule.point or metric.get("low") is None:
        return figure
    if rule.other is None:
        return float(metric["high"] if rule.sign == "<=" else metric["low"])
    beside = rule.factor * metric[rule.other]
    low, high = change(metric["name"], rule.other, rule.factor) or (metric["low"] - beside, metric["high"] - beside)
    return float(rule.factor * metric[rule.other] + (high if rule.sign == "<=" else low))


def check_rules(rules: Mapping[str, str], names: Iterable[str], *, control: bool) -> None:
    """Refuses rules that cannot be judged, before anything is loaded.

    Args:
        names: the metrics there are.
        control: whether there will be a control model.

    Raises:
        UserError: as `judge_gates`.
    """
    known = set(names)
    for name, rule in rules.items():
        metric, _, who = name.partition("@")
        if metric not in known:
            raise unknown_name("metric in gates", metric, known, where="gates")
        if who not in ("", "base", "control"):
            raise unknown_name("model in gates", who, ["base", "control"], where=f"gates: {name}")
        read_rule(name, rule, {"base": 0.0, "control": 0.0 if control else None})


def check_readable(rules: Mapping[str, str]) -> None:
    """Refuses rules that no audit could read, whatever suite and control it will have.

    Raises:
        UserError: one is not a rule.
    """
    for name, rule in rules.items():
        read_rule(name, rule, {"base": 0.0, "control": 0.0})


def read_rule(name: str, rule: str, metric: Mapping[str, Any]) -> Rule:
    """A rule on one metric.

    Raises:
        UserError: it is not a rule, or it speaks of a control that this audit has not.
    """
    match = _RULE.match(rule.strip())
    if match is None:
        raise UserError(
            f"The rule '{rule}' cannot be read.",
            where=f"gates: {name}",
            fix='"<= 0.10", ">= -0.5", "<= base + 0.10", ">= base - 0.05", ">= 0.9 * base", or "point <= 0.10"',
        )
    point, sign = bool(match["point"]), match["sign"]
    if match["number"]:
        return Rule(point, sign, None, 0.0, float(match["number"]))
    other = match["other"] or match["scaled"]
    if metric[other] is None:
        raise UserError(f"The rule '{rule}' needs a control model.", where=f"gates: {name}",
                        fix="audit_control: NAME in the recipe, or audit --control NAME")  # fmt: skip
    return Rule(point, sign, other, float(match["factor"] or 1.0), float("".join((match["plus"] or "0").split())))


def read_application(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """The gates of an application, shipped (`copyright`, `privacy`, `harm`) or a YAML file: rules and reasons.

    The file maps metrics to rules, or to `{rule: …, why: …}`.

    Raises:
        UserError: there is none of that name, or the file is no such mapping.
    """
    shipped = {file.stem: file for file in APPLICATIONS.glob("*.yaml")}
    given = read_recipe(name) if name.endswith((".yaml", ".yml")) else None
    if given is None:
        if name not in shipped:
            raise unknown_name("application", name, shipped, where="--gates")
        given = read_recipe(shipped[name])
    rules, why = {}, {}
    for metric, entry in given.items():
        own = entry if isinstance(entry, dict) else {"rule": entry}
        if not isinstance(own.get("rule"), str):
            raise UserError("A gate is a rule, or a rule with a why.", where=f"{name}: {metric}")
        rules[str(metric)], why[str(metric)] = own["rule"], str(own.get("why", ""))
    return rules, why
