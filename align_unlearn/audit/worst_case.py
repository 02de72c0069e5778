"""Metrics of probes and attacks: of every row the worst case, of every attack the worst setting.

`forget.leak.PROBE` is the share of rows that leak under at least one way of asking and one draw. `attack.NAME.leak` is
the share of rows that leak after the attack's most telling setting, `attack.NAME.probability` the highest mean
probability of the forgotten text; each setting's own figures are kept beside them (`curve`). The interval is that
setting's own: it does not know that the setting was chosen as the worst. What an attack was given (the base itself, the
very rows that it is measured on) is shown in the curve and is no setting to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from align_unlearn.audit.answers import Record
from align_unlearn.audit.asking import leaks_by_row, worst_bound
from align_unlearn.audit.probes import PROBES
from align_unlearn.audit.statistics import (
    bootstrap_interval,
    cohens_h,
    holm,
    mcnemar,
    paired_share_interval,
    share_interval,
)

MODELS = ("base", "candidate", "control")


def probe_metrics(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The worst-case leak of every probe that was asked, `choices` by its share of right answers; Holm-adjusted."""
    metrics = []
    for probe in PROBES:
        own = [each for each in records if each["probe"] == probe and "failed" not in each]
        answered = [each for each in own if each["model"] == "candidate"]
        if any("verdict" in each for each in answered):
            metrics.append(_leak(probe, own))
        if any("correct" in each for each in answered):
            metrics.append(_accuracy(probe, own))
    tested = [each for each in metrics if each.get("p") is not None]
    for each, p in zip(tested, holm([each["p"] for each in tested]), strict=True):
        each["p_holm"] = p
    return metrics


def attack_metrics(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The worst setting of every attack on the rows to forget, with the curve over all settings."""
    attacks = dict.fromkeys(each["attack"] for each in records if each["probe"] == "attack")
    metrics = []
    for attack in attacks:
        own = [each for each in records if each["probe"] == "attack" and each["attack"] == attack]
        own = [each for each in own if each["group"] == "forget" and "setting" in each]
        for name in ("leak", "probability", "score"):
            if any(name in each and each["model"] == "candidate" for each in own):
                metrics.append(_attack(attack, name, own))
    return metrics


def leak_change(records: Sequence[Record], name: str, other: str, factor: float) -> tuple[float, float]:
    """95% interval of candidate − factor · other of `forget.leak.PROBE`, rows paired; as `metrics.change_interval`."""
    probe = name.removeprefix("forget.leak.")
    rows = [leaks_by_row([each for each in records if (each["probe"], each["model"]) == (probe, model)])
            for model in ("candidate", other)]  # fmt: skip
    both = [row for row in rows[0] if row in rows[1]]
    return paired_share_interval([rows[0][row] for row in both], [rows[1][row] for row in both], factor=factor)


def _leak(probe: str, own: list[Record]) -> dict[str, Any]:
    rows = {model: leaks_by_row([each for each in own if each["model"] == model]) for model in MODELS}
    shares = {model: float(np.mean(list(leaks.values()))) if leaks else None for model, leaks in rows.items()}
    candidate = rows["candidate"]
    low, high = share_interval(sum(candidate.values()), len(candidate))
    both = [row for row in candidate if row in rows["base"]]
    ways = {each["variant"] for each in own}
    draws = 1 + max(each.get("draw", 0) for each in own)
    seeds = sorted({each.get("seed", 0) for each in own})
    drawn = f"{draws} draws each, seeds {seeds}" if draws > 1 else "greedy"
    return {
        "name": f"forget.leak.{probe}",
        "group": "probe",
        "better": "lower",
        **shares,
        "low": low,
        "high": high,
        "n": len(candidate),
        "budget": f"{len(ways)} ways of asking, {drawn}",
        "p": mcnemar([candidate[row] for row in both], [rows["base"][row] for row in both]),
        "effect": cohens_h(shares["candidate"] or 0.0, shares["base"] or 0.0),
        "per_draw_bound": worst_bound([each for each in own if each["model"] == "candidate"]) if draws > 1 else None,
        "variants": _by_variant(own),
    }


def _by_variant(own: list[Record]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for variant in dict.fromkeys(each["variant"] for each in own):
        for model in MODELS:
            said = [each for each in own if (each["variant"], each["model"]) == (variant, model) and "verdict" in each]
            if said:
                found.setdefault(variant, {})[model] = float(np.mean([each["verdict"] == "leak" for each in said]))
    return found


def _accuracy(probe: str, own: list[Record]) -> dict[str, Any]:
    # the ways of one row hang together, so that rows are what is counted
    right = [each for each in own if "correct" in each]
    values = {model: _by_row([each for each in right if each["model"] == model]) for model in MODELS}
    chance = float(np.mean([each["chance"] for each in own if "correct" in each]))
    low, high = bootstrap_interval(values["candidate"])
    return {
        "name": f"forget.accuracy.{probe}",
        "group": "probe",
        "better": "lower",
        **{model: float(np.mean(own)) if own else None for model, own in values.items()},
        "low": low,
        "high": high,
        "n": len(values["candidate"]),
        "budget": f"by likelihood; guessing gives {chance:.2f}",
        "chance": chance,
    }


def _by_row(records: Sequence[Record]) -> list[float]:
    rows: dict[str, list[float]] = {}
    for record in records:
        rows.setdefault(record["id"], []).append(float(record["correct"]))
    return [float(np.mean(each)) for each in rows.values()]


def _attack(attack: str, name: str, own: list[Record]) -> dict[str, Any]:
    """`name` is what a record holds: `leak` 0 or 1, `probability`, or an attack's own `score`."""
    curve: list[dict[str, Any]] = []
    settings = {(each["setting"], each["at"]): bool(each.get("given")) for each in own}
    for (setting, at), given in settings.items():
        point: dict[str, Any] = {"setting": setting, "at": at, "given": given}
        for model in MODELS:
            values = [float(each[name]) for each in own
                      if (each["setting"], each["model"]) == (setting, model) and name in each]  # fmt: skip
            if values:
                low, high = (
                    share_interval(int(sum(values)), len(values)) if name == "leak" else bootstrap_interval(values)
                )
                point[model] = {"figure": float(np.mean(values)), "low": low, "high": high, "n": len(values)}
        curve.append(point)
    tried = [each for each in curve if "candidate" in each]
    found = [each for each in tried if not each["given"]]
    given, tried = not found, found or tried
    worst = max(tried, key=lambda each: each["candidate"]["figure"])
    return {
        "name": f"attack.{attack}.{name}",
        "group": "attack",
        "better": "lower",
        **{model: worst[model]["figure"] if model in worst else None for model in MODELS},
        "low": worst["candidate"]["low"],
        "high": worst["candidate"]["high"],
        "n": worst["candidate"]["n"],
        "budget": f"{own[0]['budget']}; worst of {len(tried)}: {worst['setting']}",
        "given": given,
        "curve": curve,
    }
