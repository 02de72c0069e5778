"""Plots of what each way of shipping leaves: bars, and a map by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from align_unlearn.report.plots import svg_text


def kept_bars(exports: Sequence[Mapping[str, Any]]) -> str:
    """Forgetting and utility that each export keeps, and the share that is asked for."""
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(exports) + 1.0))
    for row, each in enumerate(reversed(exports)):
        forgetting, utility = each["forgetting_kept"], each["utility_kept"]
        if forgetting is not None:
            axes.barh(row + 0.19, min(max(forgetting, 0.0), 1.2), height=0.36, color="#2e6da4")
        if utility is not None:
            axes.barh(row - 0.19, min(utility, 1.2), height=0.36, color="#4b9b5f")
    axes.axvline(0.90, color="#2e6da4", linewidth=0.8, linestyle=":")
    axes.axvline(0.95, color="#4b9b5f", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(exports)), [each["name"] for each in reversed(exports)], fontsize=8)
    axes.set_xlim(0, 1.22)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ("#2e6da4", "#4b9b5f")]
    axes.legend(handles, ["forgetting kept", "utility kept"], ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0),
                frameon=False, fontsize=9)  # fmt: skip
    return svg_text(figure)


def layer_maps(exports: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """By figure, its map."""
    return {name: layer_map(exports, name) for name in ("share", "cosine")}


def layer_map(exports: Sequence[Mapping[str, Any]], figure_of: str) -> str | None:
    """By layer (mean over its matrices) and export, what is left of the update; none without layers.

    Args:
        figure_of: `share` of the update that is left, or its `cosine` with it on the adapter's row space.
    """
    names = sorted({_block(name) for each in exports for name in each["layers"]}, key=lambda name: (len(name), name))
    if not names:
        return None
    values = np.full((len(exports), len(names)), np.nan)
    for row, each in enumerate(exports):
        for column, name in enumerate(names):
            own = [layer[figure_of] for key, layer in each["layers"].items() if _block(key) == name]
            if own:
                values[row, column] = float(np.mean(own))
    figure, axes = plt.subplots(figsize=(7.2, 0.34 * len(exports) + 1.2))
    drawn = axes.imshow(values, aspect="auto", vmin=0.0, vmax=1.0, cmap="viridis")
    axes.set_yticks(range(len(exports)), [each["name"] for each in exports], fontsize=8)
    axes.set_xticks(range(0, len(names), max(1, len(names) // 10)))
    axes.set_xlabel("layer")
    figure.colorbar(drawn, ax=axes, fraction=0.03)
    return svg_text(figure)


def _block(name: str) -> str:
    """The number of the layer that a matrix belongs to."""
    return next((part for part in name.split(".") if part.isdigit()), name)
