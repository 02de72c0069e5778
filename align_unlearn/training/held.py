"""What all trainers share: a retain term that holds the policy near the original, a state that survives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_unlearn.errors import UserError
from align_unlearn.training.callbacks import DualAscent, FiniteGradients, StopRules
from align_unlearn.training.checkpoints import WholeCheckpoints
from align_unlearn.training.drift_budget import DriftBudget
from align_unlearn.training.ref_cache import with_ref_hidden
from align_unlearn.training.retain_term import HeldByDrift, RetainTerm, make_retain_term


class HeldTrainer(WholeCheckpoints):
    """A mix-in before a TRL trainer. `hold` is called once, after the TRL trainer's `__init__`."""

    drift: DriftBudget | None
    retain_term: RetainTerm | None
    stop_rules: StopRules

    # of the TRL trainer that this is mixed into
    model: Any
    accelerator: Any
    processing_class: Any
    callback_handler: Any
    current_gradient_accumulation_steps: Any
    add_callback: Any
    train: Any
    _tokenizer: Any
    _prepare_input: Any

    def hold(self, retain_rows: Any | None, retain: str, settings: dict[str, Any] | None = None) -> Any | None:
        """Makes the retain term and the rules that end a run; trainable weights become fp32.

        Args:
            retain_rows: rows of `input_ids` and `labels`, or none.
            retain: name of the retain term.
            settings: hyper-parameters of the objective, which the retain term may share.

        Returns:
            The retain rows that the term is computed on, with what is kept of the original beside them.

        Raises:
            UserError: a retain term without retain rows.
        """
        args = self.args
        if retain != "none" and retain_rows is None:
            raise UserError(
                f"The retain term '{retain}' needs a retain set.",
                where="retain_dataset",
                fix="name one with --retain_dataset, or go without with --retain none (the report will say so)",
            )
        self.retain_term = make_retain_term(retain, args, settings or {})
        self.drift = self.retain_term.budget if isinstance(self.retain_term, HeldByDrift) else None
        if self.retain_term is not None:
            self.add_callback(DualAscent(self.retain_term))
        self.stop_rules = StopRules(getattr(args, "forget_target", None), args.drift_patience, self.drift)
        self.add_callback(self.stop_rules)
        self.add_callback(FiniteGradients())
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                # TRL casts adapters on quantised bases to bf16, where small steps round to nothing.
                parameter.data = parameter.data.float()
        rows = None if retain == "none" else retain_rows
        if rows is not None and args.cache_ref_hidden:
            folder = Path(args.output_dir) / "cache"
            with self.accelerator.autocast():
                rows = with_ref_hidden(rows, self.model, folder, batch_size=args.per_device_train_batch_size)
        return rows

    def note(self, name: str, value: Tensor | float) -> None:
        """Adds a figure to the next line of the log."""
        mode = "train" if self.model.training else "eval"
        figure = float(value.detach() if isinstance(value, Tensor) else value)  # numpy's cannot be written as JSON
        self._metrics[mode][name].append(figure)

    def check_finite(self, loss: Tensor) -> Tensor:
        """Stops the run before a loss that is not a number reaches the weights.

        Raises:
            UserError: it is not finite; checkpoints and weights are those of the last good step.
        """
        if not torch.isfinite(loss.detach()):
            step = self.state.global_step + 1
            raise UserError(
                f"The loss is {loss.item()} at step {step}; the run was stopped before it reached the weights.",
                where=str(self.args.output_dir),
                fix="a lower --learning_rate or weight, with another --output_dir; the last checkpoint is good",
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log line, with the retain term's weights beside the loss."""
        if self.retain_term is not None and self.model.training:
            logs.update(self.retain_term.metrics())
        super().log(logs, start_time)  # type: ignore[misc]

    def extra_state(self, checkpoint: Path) -> dict[str, Any]:
        """The retain term's weights and the rules that end a run."""
        return {
            "retain_term": None if self.retain_term is None else self.retain_term.state_dict(),
            "stop_rules": self.stop_rules.state_dict(),
        }

    def load_extra_state(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Takes up where `extra_state` was taken."""
        if self.retain_term is not None:
            self.retain_term.load_state_dict(state["retain_term"])
        self.stop_rules.load_state_dict(state["stop_rules"])
