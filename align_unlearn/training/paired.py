"""What both unlearning trainers share: paired batches, the retain term, and a state that survives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import rotate_checkpoints

from align_unlearn.data.batches import PairCollator, PairedRows, PairSampler
from align_unlearn.errors import UserError
from align_unlearn.objectives.view import CompletionView
from align_unlearn.training.callbacks import DualAscent, FiniteGradients, StopRules
from align_unlearn.training.checkpoints import read_state, write_state
from align_unlearn.training.drift_budget import DriftBudget
from align_unlearn.training.ref_cache import with_ref_hidden
from align_unlearn.training.retain_term import HeldByDrift, RetainTerm, make_retain_term
from align_unlearn.training.surgery import GradientSurgery

Batch = dict[str, Any]


class PairedTrainer:
    """A mix-in before a TRL trainer. `pair` is called once, after the TRL trainer's `__init__`."""

    drift: DriftBudget | None
    retain_term: RetainTerm | None
    stop_rules: StopRules
    surgery: GradientSurgery | None
    train_dataset: Any
    data_collator: Any

    def pair(self, retain_rows: Any | None, retain: str, settings: dict[str, Any] | None = None) -> None:
        """Draws retain rows beside the forget rows from here on.

        Args:
            retain_rows: rows of `input_ids` and `labels`, or none.
            retain: name of the retain term.
            settings: hyper-parameters of the objective, which the retain term may share.

        Raises:
            UserError: a retain term without retain rows.
        """
        args = self.args  # type: ignore[attr-defined]
        if retain != "none" and retain_rows is None:
            raise UserError(
                f"The retain term '{retain}' needs a retain set.",
                where="retain_dataset",
                fix="name one with --retain_dataset, or go without with --retain none (the report will say so)",
            )
        self.retain_term = make_retain_term(retain, args, settings or {})
        self.drift = self.retain_term.budget if isinstance(self.retain_term, HeldByDrift) else None
        if self.retain_term is not None:
            self.add_callback(DualAscent(self.retain_term))  # type: ignore[attr-defined]
        self.stop_rules = StopRules(args.forget_target, args.drift_patience, self.drift)
        self.add_callback(self.stop_rules)  # type: ignore[attr-defined]
        self.add_callback(FiniteGradients())  # type: ignore[attr-defined]
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]  # type: ignore
        for name, parameter in self.model.named_parameters():  # type: ignore[attr-defined]
            if parameter.requires_grad and "lora_" in name:
                # TRL casts adapters on quantised bases to bf16, where small steps round to nothing.
                parameter.data = parameter.data.float()
        self.surgery = GradientSurgery(trainable) if args.gradient_surgery else None
        rows = None if retain == "none" else retain_rows
        if rows is not None and args.cache_ref_hidden:
            folder = Path(args.output_dir) / "cache"
            with self.accelerator.autocast():  # type: ignore[attr-defined]
                rows = with_ref_hidden(rows, self.model, folder, batch_size=args.per_device_train_batch_size)  # type: ignore
        self.train_dataset = PairedRows(self.train_dataset, rows)
        self.data_collator = PairCollator(self.data_collator, self._tokenizer.pad_token_id)  # type: ignore

    def whole_loss(self, model: Any, forget: Tensor, retain_batch: Batch | None) -> Tensor:
        """forget_coef · forget + the weighted retain term of a batch.

        With gradient surgery the retain term's gradient is taken here and kept apart until the step.
        """
        loss = self.forget_coef * forget
        if retain_batch is None or self.retain_term is None:
            return loss
        retain = self.retain_term(CompletionView(model, **retain_batch))
        self.note("retain_loss", retain)
        if self.surgery is None or not model.training:
            return loss + retain
        self.check_finite(retain)
        self.surgery.add_retain(retain, 1 / self.current_gradient_accumulation_steps)  # type: ignore[attr-defined]
        return loss + retain.detach()

    @property
    def forget_coef(self) -> float:
        """Weight of the forget objective."""
        given = self.args.forget_coef  # type: ignore[attr-defined]
        return 1.0 if given is None else float(given)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.surgery is not None:
            self.surgery.operate()
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.surgery is not None:
            self.surgery.operate()  # where max_grad_norm 0 left out the clipping
            self.note("surgery/cosine", self.surgery.cosine)
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]

    def note(self, name: str, value: Tensor | float) -> None:
        """Adds a figure to the next line of the log."""
        mode = "train" if self.model.training else "eval"  # type: ignore[attr-defined]
        figure = float(value.detach()) if isinstance(value, Tensor) else value
        self._metrics[mode][name].append(figure)  # type: ignore[attr-defined]

    def check_finite(self, loss: Tensor) -> Tensor:
        """Stops the run before a loss that is not a number reaches the weights.

        Raises:
            UserError: it is not finite; checkpoints and weights are those of the last good step.
        """
        if not torch.isfinite(loss.detach()):
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            raise UserError(
                f"The loss is {loss.item()} at step {step}; the run was stopped before it reached the weights.",
                where=str(self.args.output_dir),  # type: ignore[attr-defined]
                fix="a lower --learning_rate or --forget_coef with another --output_dir; the last checkpoint is good",
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log line, with the retain term's weights beside the loss."""
        if self.retain_term is not None and self.model.training:  # type: ignore[attr-defined]
            logs.update(self.retain_term.metrics())
        super().log(logs, start_time)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:
        rows = self.train_dataset
        retain = None if rows.retain is None else len(rows.retain)
        return PairSampler(len(rows.forget), retain, self.args.seed)  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Marks the checkpoint as whole before older ones are removed, so that there is always a whole one."""
        args = self.args  # type: ignore[attr-defined]
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            args.save_total_limit = limit
        state = {
            "retain_term": None if self.retain_term is None else self.retain_term.state_dict(),
            "stop_rules": self.stop_rules.state_dict(),
            "log_window": {name: list(values) for name, values in self._metrics["train"].items()},  # type: ignore
        }
        write_state(Path(args.output_dir) / f"checkpoint-{self.state.global_step}", state)  # type: ignore[attr-defined]
        rotate_checkpoints(output_dir=args.output_dir, save_total_limit=limit)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        state = read_state(Path(resume_from_checkpoint))
        if self.retain_term is not None:
            self.retain_term.load_state_dict(state["retain_term"])
        self.stop_rules.load_state_dict(state["stop_rules"])
        for name, values in state["log_window"].items():
            self._metrics["train"][name].extend(values)  # type: ignore[attr-defined]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a card into each checkpoint; the run folder's manifest and report say more."""
