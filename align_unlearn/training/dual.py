"""Dual ascent on one constraint: a weight that rises while a measure stands over its limit, and falls back otherwise.

    λ ← min(highest, max(0, λ + step · (measure − limit)))

The retain loss under an ε (arXiv:2506.05314) and the cost of PPO-Lagrangian (Ray et al. 2019) are held by it. The drift
budget is not: its weights are multiplied, because its measures differ by orders of magnitude (`drift_budget.py`).
"""

from __future__ import annotations

import math


class DualWeight:
    """λ of one constraint.

    Args:
        limit: what the measure is to stay at or under, in its own units.
        start: λ at first.
        step: of the ascent.
        highest: bound of λ.
    """

    def __init__(self, limit: float, *, start: float, step: float, highest: float = math.inf) -> None:
        self.limit = limit
        self.value = start
        self.step = step
        self.highest = highest
        self.measured = 0.0

    def update(self, measured: float) -> None:
        """One step of dual ascent."""
        self.measured = measured
        self.value = min(self.highest, max(0.0, self.value + self.step * (measured - self.limit)))

    def state_dict(self) -> dict[str, float]:
        """λ and the last measure."""
        return {"weight": self.value, "measured": self.measured}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes up where `state_dict` was taken."""
        self.value, self.measured = state["weight"], state["measured"]
