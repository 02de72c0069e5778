"""The page's plots, as SVG text: what was said before and after, and how far retained text drifted."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

matplotlib.rcParams["text.parse_math"] = False  # names of data sets are text, not formulas

Record = dict[str, Any]
COLOURS = {"leak": "#c0392b", "refuse": "#2e6da4", "answer": "#4b9b5f", "gibberish": "#8a8a8a"}
MODELS = {"base": "before", "candidate": "after", "control": "never saw it"}
GROUPS = {"forget": "to be forgotten", "neighbours": "look-alikes", "retain": "to be kept"}


def verdict_bars(records: Sequence[Record]) -> str:
    """Shares of verdicts, a bar for each group and model."""
    said = [record for record in records if record["probe"] == "answers"]
    bars = [
        (group, model)
        for group in GROUPS
        for model in MODELS
        if any(record["group"] == group and record["model"] == model for record in said)
    ]
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(bars) + 0.9))
    for row, (group, model) in enumerate(reversed(bars)):
        own = [record for record in said if record["group"] == group and record["model"] == model]
        left = 0.0
        for verdict, colour in COLOURS.items():
            share = sum(record["verdict"] == verdict for record in own) / len(own)
            if share > 0:
                axes.barh(row, share, left=left, color=colour, height=0.74)
                if share >= 0.06:
                    axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white", size=8)
            left += share
    axes.set_yticks(range(len(bars)), [f"{GROUPS[group]}, {MODELS[model]}" for group, model in reversed(bars)])
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(
        handles, list(COLOURS), ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False, fontsize=9
    )
    return svg_text(figure)


def drift_dots(records: Sequence[Record]) -> str:
    """KL to the base of every retained row after unlearning: all its tokens, and its opening tokens."""
    own = [
        each
        for each in records
        if (each["probe"], each["group"], each["model"]) == ("likelihood", "retain", "candidate") and "kl" in each
    ]
    own = sorted(own, key=lambda each: each["kl"])
    figure, axes = plt.subplots(figsize=(7.2, 2.6))
    axes.scatter(range(len(own)), [each["kl_opening"] for each in own], s=16, color="#e09c41", label="opening tokens")
    axes.scatter(range(len(own)), [each["kl"] for each in own], s=16, color="#2e6da4", label="all tokens")
    axes.set_ylabel("KL to the base, nats a token")
    axes.set_xlabel("retained rows, by drift")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return svg_text(figure)


def overlap_dots(records: Sequence[Record]) -> str:
    """Longest verbatim run of tokens of each row that has a text of its own, before and after."""
    groups = [group for group in GROUPS if any("verbatim_run" in each and each["group"] == group for each in records)]
    figure, axes = plt.subplots(figsize=(7.2, 0.5 * 2 * len(groups) + 1.0))
    rows = [(group, model) for group in groups for model in ("base", "candidate")]
    for row, (group, model) in enumerate(reversed(rows)):
        runs = [each["verbatim_run"] for each in records
                if each.get("group") == group and each.get("model") == model and "verbatim_run" in each]  # fmt: skip
        spread = [row + 0.24 * ((at * 7 % 11) / 5 - 1) for at in range(len(runs))]
        axes.scatter(runs, spread, s=14, alpha=0.7, color="#c0392b" if group == "forget" else "#2e6da4")
    axes.set_yticks(range(len(rows)), [f"{GROUPS[group]}, {MODELS[model]}" for group, model in reversed(rows)])
    axes.set_xlabel("longest verbatim run, tokens")
    axes.set_xlim(left=0)
    return svg_text(figure)


def svg_text(figure: Any) -> str:
    """A figure as SVG text, without the frame's upper and right side; the figure is closed.

    What is black takes the colour of the page's text, and there is no background, so that it can be read on dark pages.
    """
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    found = text.getvalue()[text.getvalue().index("<svg") :]
    return found.replace("#000000", "currentColor").replace("<svg ", '<svg fill="currentColor" ', 1)
