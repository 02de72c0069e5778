"""The drift budget: how far the policy may move from the original on retained text, held by dual ascent.

The user sets a budget in nats; nobody tunes a coefficient. Three measures of the exact KL(original ‖ policy) are each
bounded, with a weight λ of their own:

    mean     the mean over a row's tokens, averaged over rows                  ≤ max_drift
    opening  the mean over the first tokens of the answer, over rows           ≤ max_drift_opening
    tail     the 0.9 quantile over recent rows of the row's mean               ≤ max_drift_tail

After each optimiser step λ ← λ·exp(η·clip(measure / budget − 1, −1/4, 1)), bounded (exponentiated-gradient ascent on
the dual): it does not matter whether the forget loss is of order 1 or of order 2/β. The weights rise faster than they
fall, since all runs begin far below the budget and it takes a few steps for a drift to show. That makes noise push them
up, so that the means are taken over the last steps, not over one batch: with batches of four, unsmoothed, the weight of
the opening went to 600 times its start and held the drift at a fifth of its budget. What is penalised is a
sum over rows, so that one batch of eight and eight batches of one give the same gradient; the tail is penalised by how
far each row stands over its budget.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

QUANTILE = 0.9
WINDOW = 64
"""Rows that the quantile is taken over."""
SMOOTHED = 4
"""Optimiser steps that the means are taken over."""
LOWEST, HIGHEST = 1e-2, 1e4
"""Bounds of a weight, as multiples of the one it started from."""


class DriftBudget:
    """Holds KL(original ‖ policy) on retain rows under its budgets.

    Args:
        max_drift: budget of the mean, nats a token.
        max_opening: budget of the opening tokens, nats a token; 4·max_drift where none is given.
        max_tail: budget of the quantile over rows, nats a token; 4·max_drift where none is given.
        coef: weight that each of the three starts from.
        rate: η.
        opening_tokens: how many tokens are the opening.
    """

    def __init__(
        self,
        max_drift: float,
        max_opening: float | None = None,
        max_tail: float | None = None,
        *,
        coef: float = 1.0,
        rate: float = 0.2,
        opening_tokens: int = 4,
    ) -> None:
        self.budgets = {
            "mean": max_drift,
            "opening": 4 * max_drift if max_opening is None else max_opening,
            "tail": 4 * max_drift if max_tail is None else max_tail,
        }
        self.coef = coef
        self.rate = rate
        self.opening_tokens = opening_tokens
        self.weights = dict.fromkeys(self.budgets, coef)
        self.measured = dict.fromkeys(self.budgets, 0.0)
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._last_steps: deque[tuple[float, float]] = deque(maxlen=SMOOTHED)
        self._steps_over, self._steps = 0, 0
        self._rows: list[float] = []
        self._openings: list[float] = []

    def penalty(self, kl: Tensor, mask: Tensor) -> Tensor:
        """The weighted retain term of a batch, and a note of what it measured.

        Args:
            kl: (B, T) KL(original ‖ policy) at each labelled position, 0 elsewhere.
            mask: (B, T), True at labelled positions.

        Returns:
            A scalar: the sum of weight times measure, a mean over rows.
        """
        rows = kl.sum(-1) / mask.sum(-1).clamp(min=1)
        first = mask & (mask.cumsum(-1) <= self.opening_tokens)
        openings = (kl * first).sum(-1) / first.sum(-1).clamp(min=1)
        over = torch.relu(rows - self.budgets["tail"])
        self._rows += rows.detach().tolist()
        self._openings += openings.detach().tolist()
        terms = {"mean": rows, "opening": openings, "tail": over}
        return torch.stack([self.weights[name] * term.mean() for name, term in terms.items()]).sum()

    def update(self) -> None:
        """One step of dual ascent on what was measured since the last; call it after each optimiser step."""
        if not self._rows:
            return
        self._recent.extend(self._rows)
        count = len(self._rows)
        self._last_steps.append((math.fsum(self._rows) / count, math.fsum(self._openings) / count))
        means, openings = zip(*self._last_steps, strict=True)
        self.measured = {
            "mean": math.fsum(means) / len(means),
            "opening": math.fsum(openings) / len(openings),
            "tail": float(torch.tensor(list(self._recent)).quantile(QUANTILE)),
        }
        self._rows, self._openings = [], []
        self._steps += 1
        self._steps_over += self.exceeded
        for name, budget in self.budgets.items():
            excess = self.measured[name] / budget - 1 if budget > 0 else 1.0
            weight = self.weights[name] * math.exp(self.rate * max(-0.25, min(1.0, excess)))
            self.weights[name] = max(self.coef * LOWEST, min(self.coef * HIGHEST, weight))

    @property
    def strength(self) -> float:
        """The largest of the three weights: what a regulariser that stands in for the KL is weighted with."""
        return max(self.weights.values())

    @property
    def exceeded(self) -> bool:
        """Whether any measure stands over its budget."""
        return any(self.measured[name] > budget for name, budget in self.budgets.items())

    def window_exceeded(self) -> bool:
        """Whether most steps since the last call stood over a budget."""
        over = 2 * self._steps_over > self._steps
        self._steps_over, self._steps = 0, 0
        return over

    def metrics(self) -> dict[str, float]:
        """What is logged beside the loss."""
        measured = {f"drift/{name}": value for name, value in self.measured.items()}
        return measured | {f"drift_weight/{name}": value for name, value in self.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "weights": self.weights,
            "measured": self.measured,
            "recent": list(self._recent),
            "last_steps": [list(step) for step in self._last_steps],
            "window": [self._steps_over, self._steps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was taken."""
        self.weights = dict(state["weights"])
        self.measured = dict(state["measured"])
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._last_steps = deque(map(tuple, state["last_steps"]), maxlen=SMOOTHED)
        self._steps_over, self._steps = state["window"]
