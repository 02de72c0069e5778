"""Gates: the rules that a recipe says an audit must pass.

A rule is `<=` or `>=` and a bound: a number (`<= 0.10`), a number beside the base's or the control's figure
(`<= base + 0.10`), or a multiple of it (`>= 0.9 * base`). `METRIC@base` holds the base's own figure to a rule: a
precondition without which the others say nothing (that there was something to forget).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from align_unlearn.errors import UserError, unknown_name

_NUMBER = r"\d+(?:\.\d+)?"
_RULE = re.compile(
    rf"^(?P<sign><=|>=)\s*(?:(?P<number>{_NUMBER})|(?P<other>base|control)(?:\s*\+\s*(?P<plus>{_NUMBER}))?"
    rf"|(?P<factor>{_NUMBER})\s*\*\s*(?P<scaled>base|control))$"
)


def judge_gates(rules: Mapping[str, str], metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each rule with the figure it was held against and whether it passed.

    Raises:
        UserError: a rule that cannot be read, or that names no metric of this audit.
    """
    known = {metric["name"]: metric for metric in metrics}
    gates = []
    for name, rule in rules.items():
        metric, _, who = name.partition("@")
        if metric not in known:
            raise unknown_name("metric in gates", metric, known, where="gates")
        sign, bound = read_rule(name, rule, known[metric])
        value = known[metric][who or "candidate"]
        passed = value is not None and (value <= bound if sign == "<=" else value >= bound)
        gates.append({"name": name, "rule": rule, "bound": bound, "value": value, "passed": bool(passed)})
    return gates


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


def read_rule(name: str, rule: str, metric: Mapping[str, Any]) -> tuple[str, float]:
    """The sign and the bound of a rule on one metric.

    Raises:
        UserError: it is not a rule, or it speaks of a control that this audit has not.
    """
    match = _RULE.match(rule.strip())
    if match is None:
        raise UserError(
            f"The rule '{rule}' cannot be read.",
            where=f"gates: {name}",
            fix='"<= 0.10", ">= 0.8", "<= base + 0.10" or ">= 0.9 * base"',
        )
    if match["number"]:
        return match["sign"], float(match["number"])
    other = match["other"] or match["scaled"]
    figure = metric[other]
    if figure is None:
        raise UserError(f"The rule '{rule}' needs a control model.", where=f"gates: {name}", fix="--audit_control NAME")
    bound = figure * float(match["factor"]) if match["scaled"] else figure + float(match["plus"] or 0)
    return match["sign"], bound
