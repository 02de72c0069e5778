"""What the trainers on given rows share: a retain row beside each forget row, and gradient surgery."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from align_unlearn.data.batches import PairCollator, PairedRows, PairSampler
from align_unlearn.objectives.view import CompletionView
from align_unlearn.training.held import HeldTrainer
from align_unlearn.training.surgery import GradientSurgery

Batch = dict[str, Any]


class PairedTrainer(HeldTrainer):
    """A mix-in before a TRL trainer. `pair` is called once, after the TRL trainer's `__init__`."""

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
        rows = self.hold(retain_rows, retain, settings)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.surgery = GradientSurgery(trainable) if self.args.gradient_surgery else None
        self.train_dataset = PairedRows(self.train_dataset, rows)
        self.data_collator = PairCollator(self.data_collator, self._tokenizer.pad_token_id)

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
        self.surgery.add_retain(retain, 1 / self.current_gradient_accumulation_steps)
        return loss + retain.detach()

    @property
    def forget_coef(self) -> float:
        """Weight of the forget objective."""
        given = self.args.forget_coef
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

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:
        rows = self.train_dataset
        retain = None if rows.retain is None else len(rows.retain)
        return PairSampler(len(rows.forget), retain, self.args.seed)
