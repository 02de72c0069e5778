"""The plots of an audit's evidence: ways of asking with their intervals, attacks as curves, metrics by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt

from align_unlearn.report.plots import MODELS, svg_text

Metric = dict[str, Any]
COLOURS = {"base": "#8a8a8a", "candidate": "#c0392b", "control": "#2e6da4"}
MARKS = {"base": "o", "candidate": "D", "control": "s"}


def leak_dots(metrics: Sequence[Metric]) -> str | None:
    """Share of rows that leak under each way of asking, the worst on top; none where nothing was asked."""
    own = [each for each in metrics if each["name"].startswith(("forget.leak", "forget.accuracy"))]
    return _dots(sorted(own, key=lambda each: each["candidate"]), "share of rows") if own else None


def share_dots(metrics: Sequence[Metric], groups: Sequence[str]) -> str | None:
    """Metrics between 0 and 1 of these groups; none where there are none."""
    own = [
        each
        for each in metrics
        if each["group"] in groups
        and not each["name"].startswith("forget.leak")
        and not each["name"].endswith(
            ("verbatim_run", "perplexity", "kl", "kl_opening", "kl_tail", "judge", "privleak")
        )
        and all(each[key] is None or -1e-9 <= each[key] <= 1 + 1e-9 for key in ("base", "candidate", "low", "high"))
        and each["candidate"] is not None
    ]
    return _dots(list(reversed(own)), "") if own else None


def _dots(metrics: Sequence[Metric], label: str) -> str:
    figure, axes = plt.subplots(figsize=(7.2, 0.3 * len(metrics) + 1.1))
    for row, metric in enumerate(metrics):
        axes.axhline(row, color="#8a8a8a", linewidth=0.3, alpha=0.5)
        if metric["low"] is not None:
            axes.plot(
                [metric["low"], metric["high"]], [row, row], color=COLOURS["candidate"], linewidth=2.2, alpha=0.55
            )
        for model in ("base", "control", "candidate"):
            if metric.get(model) is not None:
                axes.plot(metric[model], row, MARKS[model], color=COLOURS[model], markersize=5)
    axes.set_yticks(range(len(metrics)), [each["name"] for each in metrics], fontsize=8)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(label)
    _legend(axes, [model for model in MODELS if any(each.get(model) is not None for each in metrics)])
    return svg_text(figure)


def attack_curves(metrics: Sequence[Metric]) -> str | None:
    """Every attack along its settings, candidate beside control or base; none where nothing was attacked."""
    own = [each for each in metrics if each["group"] == "attack" and each.get("curve")]
    if not own:
        return None
    rows = -(-len(own) // 2)
    figure, places = plt.subplots(rows, 2, figsize=(7.2, 2.1 * rows), squeeze=False)
    for axes in places.flat[len(own) :]:
        axes.set_visible(False)
    for axes, metric in zip(places.flat, own, strict=False):
        _curve(axes, metric)
    shown = [model for model in MODELS if any(model in point for each in own for point in each["curve"])]
    _legend(places.flat[0], shown)
    return svg_text(figure)


def _curve(axes: Any, metric: Metric) -> None:
    curve = sorted(metric["curve"], key=lambda point: point["at"])
    named = metric["name"].startswith("attack.requantise")
    for model, colour in COLOURS.items():
        points = [(point["at"], point[model]) for point in curve if model in point]
        if points:
            at = [place for place, _ in points]
            figures = [point["figure"] for _, point in points]
            low = [max(0.0, point["figure"] - point["low"]) for _, point in points]
            high = [max(0.0, point["high"] - point["figure"]) for _, point in points]
            line = "none" if named else "-"
            axes.errorbar(at, figures, yerr=[low, high], color=colour, marker=MARKS[model], markersize=4, capsize=2,
                          linestyle=line, linewidth=1.3)  # fmt: skip
    if named:
        axes.set_xticks([point["at"] for point in curve], [point["setting"] for point in curve], fontsize=8)
        axes.margins(x=0.15)
    axes.set_title(metric["name"].removeprefix("attack."), fontsize=9)
    axes.set_ylim(-1.03 if metric["name"].endswith(".score") else -0.03, 1.03)


def _legend(axes: Any, models: Sequence[str]) -> None:
    handles = [
        plt.Line2D([], [], color=COLOURS[model], marker=MARKS[model], linestyle="none", label=MODELS[model])
        for model in models
    ]
    axes.legend(handles=handles, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.12 if axes.get_title() else 1.0),
                frameon=False, fontsize=8)  # fmt: skip
