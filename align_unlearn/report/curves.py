"""The learning curves of an online run, from its log: what it was trained on beside what only watched.

Where the reward rises and the held-out judge does not, the policy has found a hole in the reward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from align_unlearn.files import write_text
from align_unlearn.report.plots import COLOURS, svg_text

Line = dict[str, Any]
KINDS = {"forget": "to be forgotten", "neighbour": "look-alikes", "retain": "everyday"}
WINDOW = 3
"""Logged batches that a curve's mean is taken over."""


def write_curves(run: str | Path) -> Path | None:
    """Writes `RUN/curves.svg`; none where the run has no rollouts."""
    log = Path(run) / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.is_file() else []
    if not any(name.startswith("verdict/") for line in lines for name in line):
        return None
    page = Path(run) / "curves.svg"
    write_text(page, curves(lines))
    return page


def curves(lines: list[Line]) -> str:
    """The curves as SVG text.

    Args:
        lines: of the log, each with a `step`.
    """
    kinds = [kind for kind in KINDS if any(f"reward/{kind}" in line for line in lines)]
    figure, rows = plt.subplots(3, 2, figsize=(9.6, 9.2))
    (rewards, agreement), (whole, drift), (verdicts, others) = rows
    colours = {kind: f"C{at}" for at, kind in enumerate(KINDS)}
    watched = rewards.twinx()  # in units of its own: what counts is whether both rise
    _draw(rewards, lines, {f"reward/{kind}": (KINDS[kind], "-", colours[kind]) for kind in kinds})
    _draw(watched, lines, {f"heldout/{kind}": (KINDS[kind], "--", colours[kind]) for kind in kinds})
    rewards.set_ylabel("reward", fontsize=9)
    watched.set_ylabel("held-out judge (dashed)", fontsize=9)
    watched.set_visible(bool(watched.lines))
    rewards.set_title("trained on, and only watched", fontsize=10)
    _draw(agreement, lines, {f"agreement/{kind}": (KINDS[kind], "-", colours[kind]) for kind in kinds})
    agreement.set_title("rank correlation of reward and held-out judge", fontsize=10)
    _draw(whole, lines, {"reward": ("all rows", "-", "C3")})
    whole.set_title("mean reward of a batch", fontsize=10)
    forget = {f"verdict/forget/{each}": (each, "-", colour) for each, colour in COLOURS.items()}
    _draw(verdicts, lines, forget)
    verdicts.set_title("verdicts on what is to be forgotten", fontsize=10)
    _draw(
        others,
        lines,
        {
            f"verdict/{kind}/{each}": (f"{each}, {KINDS[kind]}", style, COLOURS[each])
            for kind, style in (("neighbour", "-"), ("retain", "--"))
            for each in ("refuse", "gibberish")
        },
    )
    others.set_title("refusals and gibberish elsewhere", fontsize=10)
    _draw(drift, lines, {"drift/mean": ("KL on retained text", "-", None), "kl": ("KL of rollouts", "--", None)})
    drift.set_title("distance from the original, nats a token", fontsize=10)
    for axes in (verdicts, others):
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in rows.flat:
        axes.set_xlabel("optimiser step", fontsize=9)
        axes.legend(frameon=False, fontsize=8) if axes.lines else axes.set_visible(False)
    return svg_text(figure)


def _draw(axes: Any, lines: list[Line], series: Mapping[str, tuple[str, str, str | None]]) -> None:
    for name, (label, style, colour) in series.items():
        found = [line for line in lines if line.get(name) is not None and "train_runtime" not in line]
        points = [(line["step"], float(line[name])) for line in found]  # the summary says the last step once more
        if not points:
            continue
        steps = [step for step, _ in points]
        smooth = []
        for at in range(len(points)):
            window = [value for _, value in points[max(0, at - WINDOW + 1) : at + 1]]
            smooth.append(sum(window) / len(window))
        axes.plot(steps, smooth, style, color=colour, label=label, linewidth=1.6)
