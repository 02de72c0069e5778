"""Can the forgotten rows still be told from rows that were never seen? Membership inference from likelihood records.

Members are the records of the group `forget`, non-members those of `holdout`: rows of the same kind that no model was
trained on. A score is higher the more a row looks like one that was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from align_unlearn.audit.answers import Record
from align_unlearn.audit.statistics import CONFIDENCE, share_interval

Floats = NDArray[np.float64]
SCORES: dict[str, Callable[[Record], float]] = {
    "loss": lambda record: -record["nll"],
    "zlib": lambda record: float(record["zlib"]),
    "min_k_20": lambda record: float(record["min_k_20"]),
    "min_k_40": lambda record: float(record["min_k_40"]),
    "min_k_plus_20": lambda record: float(record["min_k_plus_20"]),
}
"""Scores of one model alone. `reference` (the control's loss minus the model's, arXiv:2112.03570) needs a control."""
PRIVLEAK_SCORE = "min_k_40"
FALSE_POSITIVES = 0.01
MODELS = ("base", "candidate", "control")


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Chance that a member scores above a non-member, ties counted half."""
    return float(roc_auc_score([1] * len(members) + [0] * len(others), [*members, *others]))


def tpr_at(members: Sequence[float], others: Sequence[float], rate: float = FALSE_POSITIVES) -> float:
    """Share of members above a threshold that at most `rate` of the non-members pass."""
    return _tpr_of_samples(np.asarray(members, dtype=float), np.asarray(others, dtype=float), rate)


def privleak(value: float, retained: float) -> float:
    """PrivLeak (MUSE, arXiv:2407.06460) in percent: ((1 − AUC) − (1 − AUC_retain)) / (1 − AUC_retain).

    Below 0 the forgotten rows stand out as members; above 0 as rows that were pushed away. nan where the retain-only
    model tells them apart wholly.
    """
    return 100 * (retained - value) / (1 - retained) if retained < 1 else float("nan")


def membership(records: Sequence[Record]) -> list[dict[str, Any]]:
    """AUC and TPR at 1% false positives of every score and model, and PrivLeak, as `audit.json` lists metrics.

    Empty where there are no non-members.
    """
    rows = _by_model(records)
    if not all(rows.get("candidate", {}).get(group) for group in ("forget", "holdout")):
        return []
    metrics = []
    for name in [*SCORES, *(["reference"] if "control" in rows else [])]:
        scores = {model: scored for model in rows if (scored := _scores(rows, model, name)) is not None}
        if "candidate" not in scores:
            continue
        members, others = scores["candidate"]
        low, high = auc_interval(members, others)
        figures = {
            model: auc(*scores[model]) if model in scores else None for model in ("base", "candidate", "control")
        }
        n = min(len(members), len(others))
        metrics.append(_metric(f"membership.auc_{name}", figures, low, high, n, better="half"))
        rates = {
            model: tpr_at(*scores[model]) if model in scores else None for model in ("base", "candidate", "control")
        }
        low, high = tpr_interval(members, others)
        metrics.append(_metric(f"membership.tpr_{name}", rates, low, high, n))
        if name == PRIVLEAK_SCORE and figures["control"] is not None:
            control = figures["control"]
            leaks = {model: None if each is None else privleak(each, control) for model, each in figures.items()}
            low, high = privleak_interval(scores["candidate"], scores["control"])
            metrics.append(_metric("membership.privleak", leaks, low, high, n, better="zero"))
    return metrics


def auc_interval(members: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The interval of an AUC; as `interval`."""
    return interval(members, others, _auc_of_samples)


def interval(
    members: Sequence[float],
    others: Sequence[float],
    statistic: Callable[[Floats, Floats], float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap over members and non-members, each drawn anew; 0 to 1 for single rows."""
    if min(len(members), len(others)) < 2:
        return 0.0, 1.0
    found = stats.bootstrap(
        (np.asarray(members, dtype=float), np.asarray(others, dtype=float)),
        statistic,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def tpr_interval(members: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The interval of `tpr_at`: the wider of the bootstrap's and the exact one of the members at that threshold.

    0 to 1 where there are too few non-members for any rate of 1% among them.
    """
    if len(others) * FALSE_POSITIVES < 1:
        return 0.0, 1.0
    low, high = interval(members, others, _tpr_of_samples)
    exact = share_interval(round(tpr_at(members, others) * len(members)), len(members))
    return min(low, exact[0]), max(high, exact[1])


def privleak_interval(
    candidate: tuple[Sequence[float], Sequence[float]],
    control: tuple[Sequence[float], Sequence[float]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of PrivLeak: rows drawn anew, both models scored on those drawn.

    Args:
        candidate: its scores of members and of non-members.
        control: the retain-only model's, of the same rows in the same order.
    """
    draw = np.random.default_rng(seed)
    own = [[np.asarray(each, dtype=float) for each in model] for model in (candidate, control)]
    found = []
    for _ in range(resamples):
        drawn = [draw.integers(len(each), size=len(each)) for each in own[0]]
        value, retained = (_auc_of_samples(*(each[at] for each, at in zip(model, drawn, strict=True))) for model in own)
        found.append(privleak(value, retained))
    low, high = np.nanquantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _auc_of_samples(members: Floats, others: Floats) -> float:
    ranked = np.sort(others)
    below = np.searchsorted(ranked, members, "left") + np.searchsorted(ranked, members, "right")
    return float(below.mean() / 2 / len(others))


def _tpr_of_samples(members: Floats, others: Floats, rate: float = FALSE_POSITIVES) -> float:
    passing = int(rate * len(others) + 1e-9)  # so many others may pass, and the next one must not
    return float((members > np.sort(others)[::-1][passing]).mean()) if passing < len(others) else 1.0


def _by_model(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        if record["probe"] == "likelihood" and record["group"] in ("forget", "holdout") and "failed" not in record:
            found.setdefault(record["model"], {}).setdefault(record["group"], []).append(record)
    whole = [{(group, each["id"]) for group, own in groups.items() for each in own} for groups in found.values()]
    shared = set.intersection(*whole) if whole else set()  # a row that failed in one model speaks of none
    return {
        model: {group: [each for each in own if (group, each["id"]) in shared] for group, own in groups.items()}
        for model, groups in found.items()
    }


def _scores(rows: dict[str, dict[str, list[Record]]], model: str, name: str) -> tuple[list[float], list[float]] | None:
    if name != "reference":
        found = [[SCORES[name](record) for record in rows[model].get(group, [])] for group in ("forget", "holdout")]
    elif model == "control":
        return None
    else:
        known = {(group, each["id"]): each["nll"] for group, own in rows["control"].items() for each in own}
        found = [
            [known[group, each["id"]] - each["nll"] for each in rows[model].get(group, [])]
            for group in ("forget", "holdout")
        ]
    return (found[0], found[1]) if all(found) else None


def _metric(
    name: str, figures: dict[str, float | None], low: float | None, high: float | None, n: int, better: str = "lower"
) -> dict[str, Any]:
    return {"name": name, "group": "membership", "better": better, **figures, "low": low, "high": high, "n": n,
            "budget": "forget rows against rows never seen"}  # fmt: skip
