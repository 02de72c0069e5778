"""The weighted retain term of a trainer: a regulariser, and what decides its weight.

| regulariser | weight |
| --- | --- |
| `kl`, `kl+nll` | the drift budget on the KL part, `retain_coef` on the rest |
| any other with `max_drift` set | `retain_coef`, raised and lowered with the drift that is measured |
| `nll` and others with `retain_epsilon` | dual ascent on "the loss stays at most ε" |
| any with `max_drift` 0, or another than `kl` with none set | `retain_coef`, fixed |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from align_unlearn.errors import UserError
from align_unlearn.objectives.table import RETAIN, bind_retain
from align_unlearn.objectives.view import CompletionView
from align_unlearn.training.drift_budget import DriftBudget
from align_unlearn.training.dual import DualWeight

Regulariser = Callable[[CompletionView], Tensor]
DEFAULT_MAX_DRIFT = 0.1
"""Nats a token, for regularisers that bound the KL themselves."""


class RetainTerm(Protocol):
    """A weighted retain term: called with the view of a retain batch, updated after each optimiser step."""

    def __call__(self, view: CompletionView) -> Tensor:
        """The weighted term, a scalar: a mean over rows."""

    def update(self) -> None:
        """One step of dual ascent on what was measured since the last."""

    def metrics(self) -> dict[str, float]:
        """What is logged beside the loss."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was taken."""


class FixedWeight:
    """coef · regulariser."""

    def __init__(self, regulariser: Regulariser, coef: float) -> None:
        self.regulariser = regulariser
        self.coef = coef

    def __call__(self, view: CompletionView) -> Tensor:
        """The weighted term."""
        return self.coef * self.regulariser(view).mean()

    def update(self) -> None:
        """Nothing moves."""

    def metrics(self) -> dict[str, float]:
        """Nothing to tell."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """No state."""


class HeldByDrift:
    """The KL under its budget, and beside it another regulariser.

    Args:
        budget: of the exact KL(original ‖ policy).
        beside: another regulariser, or none.
        coef: weight of the other one; where none is given, its weight is the budget's largest, and the KL is measured
            but not itself penalised.
    """

    def __init__(self, budget: DriftBudget, beside: Regulariser | None = None, coef: float | None = None) -> None:
        self.budget = budget
        self.beside = beside
        self.coef = coef
        self.update = budget.update
        self.metrics = budget.metrics
        self.state_dict = budget.state_dict
        self.load_state_dict = budget.load_state_dict

    def __call__(self, view: CompletionView) -> Tensor:
        """The weighted term, and a note of the drift."""
        penalty = self.budget.penalty(view.kl, view.mask)
        if self.beside is None:
            return penalty
        other = self.beside(view).mean()
        return self.budget.strength * other if self.coef is None else penalty + self.coef * other


class HeldByEpsilon:
    """λ · (regulariser − ε), with λ ← max(0, λ + step · (regulariser − ε)) after each step (arXiv:2506.05314).

    Args:
        regulariser: the loss that is to stay at most ε.
        epsilon: ε, in the regulariser's units.
        coef: what λ starts from.
        step: of the dual ascent.
    """

    def __init__(self, regulariser: Regulariser, epsilon: float, coef: float, step: float) -> None:
        self.regulariser = regulariser
        self.dual = DualWeight(epsilon, start=coef, step=step)
        self.state_dict = self.dual.state_dict
        self.load_state_dict = self.dual.load_state_dict
        self._rows: list[float] = []

    @property
    def weight(self) -> float:
        """λ."""
        return self.dual.value

    def __call__(self, view: CompletionView) -> Tensor:
        """The weighted term, and a note of the loss."""
        rows = self.regulariser(view)
        self._rows += rows.detach().tolist()
        return self.weight * (rows.mean() - self.dual.limit)

    def update(self) -> None:
        """One step of dual ascent."""
        if self._rows:
            self.dual.update(sum(self._rows) / len(self._rows))
            self._rows = []

    def metrics(self) -> dict[str, float]:
        """Loss and weight."""
        return {"retain/measured": self.dual.measured, "retain/weight": self.weight}


def check_retain_settings(name: str, args: Any) -> None:
    """Refuses settings that would have no effect with this retain term.

    Args:
        name: of the regulariser, as it ends up.
        args: the trainer's configuration.

    Raises:
        UserError: a budget without a term to hold it, two that decide one weight, or a weight of 0 to be adapted.
    """
    budget = budget_of(name, args)
    idle = {
        "max_drift": name == "none" and bool(args.max_drift),
        "retain_epsilon": name == "none" and args.retain_epsilon is not None,
        "gradient_surgery": name == "none" and getattr(args, "gradient_surgery", False),
        "cache_ref_hidden": name == "none" and args.cache_ref_hidden,
        "max_drift_opening": budget is None and args.max_drift_opening is not None,
        "max_drift_tail": budget is None and args.max_drift_tail is not None,
        "drift_patience": budget is None and args.drift_patience is not None,
    }
    for key, without_effect in idle.items():
        if without_effect:
            why = "there is no retain term" if name == "none" else f"the retain term '{name}' has no drift budget"
            fix = "--retain kl" if name == "none" else "--max_drift 0.1"
            raise UserError(f"{key} would have no effect: {why}.", where=key, fix=f"{fix}, or leave out {key}")
    if args.retain_epsilon is not None and args.max_drift:
        raise UserError("retain_epsilon and max_drift both decide one weight.", where="retain_epsilon")
    if budget and not args.retain_coef:
        raise UserError("With retain_coef 0 the drift budget has no weight to adapt.", where="retain_coef")
    if getattr(args, "gradient_surgery", False) and args.fp16:
        raise UserError(
            "Gradient surgery does not know fp16's loss scale.", where="gradient_surgery", fix="--bf16 true"
        )


def budget_of(name: str, args: Any) -> float | None:
    """The drift budget that a regulariser is held under, nats a token, or none."""
    if name == "none" or args.retain_epsilon is not None:
        return None
    bounded = DEFAULT_MAX_DRIFT if name in ("kl", "kl+nll") else 0.0
    return (bounded if args.max_drift is None else args.max_drift) or None


def make_retain_term(name: str, args: Any, settings: dict[str, Any]) -> RetainTerm | None:
    """The retain term that the settings ask for; none for `none`.

    Args:
        name: of the regulariser.
        args: the trainer's configuration.
        settings: hyper-parameters of the objective; the regulariser takes those it knows.

    Raises:
        UserError: as `check_retain_settings`.
    """
    check_retain_settings(name, args)
    if RETAIN[name] is None:
        return None
    regulariser = bind_retain(name, settings)
    if args.retain_epsilon is not None:
        return HeldByEpsilon(regulariser, args.retain_epsilon, args.retain_coef, args.dual_step)
    max_drift = budget_of(name, args)
    if max_drift is None:
        return FixedWeight(regulariser, args.retain_coef)
    budget = DriftBudget(
        max_drift,
        args.max_drift_opening,
        args.max_drift_tail,
        coef=args.retain_coef,
        rate=args.drift_rate,
        opening_tokens=args.opening_tokens,
    )
    if name == "kl":
        return HeldByDrift(budget)
    if name == "kl+nll":
        return HeldByDrift(budget, bind_retain("nll", settings), args.retain_coef)
    return HeldByDrift(budget, regulariser)
