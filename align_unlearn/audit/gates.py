"""Gates: the rules that a recipe says an audit must pass.

A rule is `<=` or `>=` and a bound: a number (`<= 0.10`), a number beside the base's or the control's figure
(`<= base + 0.10`), or a multiple of it (`>= 0.9 * base`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align_unlearn.errors import UserError, unknown_name

_RULE = re.compile(
    r"^(?P<sign><=|>=)\s*(?:(?P<number>[\d.]+)|(?P<other>base|control)(?:\s*\+\s*(?P<plus>[\d.]+))?"
    r"|(?P<factor>[\d.]+)\s*\*\s*(?P<scaled>base|control))$"
)


def judge_gates(rules: Mapping[str, str], metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each rule with the figure it was held against and whether it passed.

    Raises:
        UserError: a rule that cannot be read, or that names no metric of this audit.
    """
    known = {metric["name"]: metric for metric in metrics}
    gates = []
    for name, rule in rules.items():
        if name not in known:
            raise unknown_name("metric in gates", name, known, where="gates")
        sign, bound = read_rule(name, rule, known[name])
        value = known[name]["candidate"]
        passed = value <= bound if sign == "<=" else value >= bound
        gates.append({"name": name, "rule": rule, "bound": bound, "value": value, "passed": bool(passed)})
    return gates


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
