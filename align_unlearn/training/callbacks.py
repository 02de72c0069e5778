"""What happens between steps: dual ascent, stop rules, and the log that is always written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from align_unlearn.errors import UserError
from align_unlearn.training.drift_budget import DriftBudget
from align_unlearn.training.retain_term import RetainTerm

FLAT = "flat_groups"
"""The share of groups of completions that had one score throughout, in the log."""


class DualAscent(TrainerCallback):  # type: ignore[misc]
    """Adapts the retain term's weights after each optimiser step (not after each micro-batch)."""

    def __init__(self, term: RetainTerm) -> None:
        self.term = term

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step of dual ascent."""
        self.term.update()


class StopRules(TrainerCallback):  # type: ignore[misc]
    """Stops when the forget rows are forgotten far enough, or the drift cannot be held.

    Args:
        forget_target: stop when `forget_nll` (nats a token, a mean over a logging window) has reached this.
        patience: stop when the drift was over its budget in this many logging windows in a row.
        budget: the drift budget, if there is one.
    """

    def __init__(self, forget_target: float | None, patience: int | None, budget: DriftBudget | None) -> None:
        self.forget_target = forget_target
        self.patience = patience
        self.budget = budget
        self.reason: str | None = None
        self._over = 0

    def state_dict(self) -> dict[str, Any]:
        """How many windows in a row were over the budget, and why the run has stopped, if it has."""
        return {"over": self._over, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was taken."""
        self._over, self.reason = state["over"], state["reason"]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Looks at the window that has just been logged."""
        if "loss" not in (logs or {}):
            return
        nll = (logs or {}).get("forget_nll")
        if nll is not None and self.forget_target is not None and nll >= self.forget_target:
            self.reason = f"forget target reached: {nll:.3f} nats a token at step {state.global_step}"
        self._over = self._over + 1 if self.budget is not None and self.budget.window_exceeded() else 0
        if self.patience is not None and self._over >= self.patience:
            self.reason = f"drift over its budget in {self._over} logging windows in a row at step {state.global_step}"
        if self.reason:
            control.should_training_stop = True


class FlatGroups(TrainerCallback):  # type: ignore[misc]
    """Stops when too many groups of completions had one reward throughout: they teach nothing, or the reward is blind.

    Args:
        share: of groups, at least which stops the run; none never does.
        patience: over this many logging windows in a row.
        rules: where the reason is written down.

    Attributes:
        windows: how many in a row there were so far.
    """

    def __init__(self, share: float | None, patience: int, rules: StopRules) -> None:
        self.share = share
        self.patience = patience
        self.rules = rules
        self.windows = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Looks at the window that has just been logged."""
        found = (logs or {}).get(FLAT)
        if found is None or self.share is None:
            return
        self.windows = self.windows + 1 if found >= self.share else 0
        if self.windows >= self.patience:
            self.rules.reason = f"{found:.0%} of the groups had one reward throughout at step {state.global_step}"
            control.should_training_stop = True


class FiniteGradients(TrainerCallback):  # type: ignore[misc]
    """Stops the run before a gradient that is not a number reaches the weights, though the loss was one."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Looks at every gradient.

        Raises:
            UserError: one is not finite; weights and checkpoints are those of the last good step.
        """
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if grads and not torch.isfinite(torch.stack([grad.sum() for grad in grads]).sum()):
            raise UserError(
                f"A gradient is not a number at step {state.global_step + 1}; it was not applied.",
                where=str(args.output_dir),
                fix="a lower --learning_rate or --forget_coef with another --output_dir; the last checkpoint is good",
            )


class JsonLinesLog(TrainerCallback):  # type: ignore[misc]
    """Every log line as JSON in `log.jsonl`. A resumed run first drops what lies beyond its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the lines up to the step that training starts from."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step(line) <= state.global_step]
        self.path.write_text("".join(line + "\n" for line in kept), "utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Appends one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}, default=str) + "\n")


class SamplesFromStart(TrainerCallback):  # type: ignore[misc]
    """Drops the samples of a try that left no checkpoint; `Rollouts.load_state_dict` does it where there is one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Removes them where training starts from its beginning."""
        if state.global_step == 0:
            self.path.unlink(missing_ok=True)


def _step(line: str) -> float:
    """The step of a log line; a line that a kill cut short belongs to no step that is kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
