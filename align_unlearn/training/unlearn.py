"""`UnlearnTrainer`: any forget objective with a retain term, on the seam of TRL's `SFTTrainer`."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from trl import SFTTrainer

from align_unlearn.data.batches import pad_rows
from align_unlearn.data.examples import read_examples
from align_unlearn.data.tokens import token_columns
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.roles import original
from align_unlearn.objectives.table import bind, forget_objective
from align_unlearn.objectives.view import CompletionView
from align_unlearn.training.configs import UnlearnConfig
from align_unlearn.training.paired import PairedTrainer


class UnlearnTrainer(PairedTrainer, SFTTrainer):  # type: ignore[misc]
    """Minimises forget_coef · forget(forget rows) + retain term(retain rows) on LoRA adapters.

    The loss is a mean over rows, so that gradient accumulation only has to average it.

    Args:
        model: the base model, without adapters.
        args: the configuration.
        objective: a name of the table, `module:function`, or `file.py:function`.
        train_dataset: rows to forget, in any format of `data/examples.py` or as `input_ids` and `labels`.
        retain_dataset: rows to keep, likewise; may be none with `retain="none"`.
        processing_class: the tokenizer.
        peft_config: the adapter.
        callbacks: as in TRL.

    Raises:
        UserError: an unknown objective or hyper-parameter, a retain term without rows, a row longer than `max_length`.
    """

    loss_is_scaled_for_ga = False
    _tag_names = ("trl", "unlearning")

    def __init__(
        self,
        model: Any,
        args: UnlearnConfig,
        *,
        objective: str = "npo",
        train_dataset: Any,
        retain_dataset: Any | None = None,
        processing_class: Any,
        peft_config: Any,
        callbacks: list[Any] | None = None,
    ) -> None:
        entry = forget_objective(objective)
        self.objective = bind(entry, objective, args.hyper_parameters())
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__init__(
            model=model,
            args=args,
            train_dataset=tokenised(train_dataset, processing_class, args.max_length),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            data_collator=lambda rows: pad_rows(rows, processing_class.pad_token_id),
        )
        self.model_accepts_loss_kwargs = False
        retain = args.retain or entry.retain
        rows = None if retain_dataset is None else tokenised(retain_dataset, processing_class, args.max_length)
        self.pair(rows, retain)
        if entry.reference and args.precompute_ref_log_probs:
            self.precompute_ref_logps()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the forget objective and the retain term, a mean over rows."""
        retain = inputs.pop("retain", None)
        with self.accelerator.autocast():
            view = CompletionView(model, **inputs)
            forget = self.objective(view).mean()
            loss = self.args.forget_coef * forget + self.retain_loss(model, retain)
        self.note("forget_loss", forget)
        self.note("forget_nll", (-view.logps.detach().sum(-1) / view.lengths).mean())
        return (self.check_finite(loss), None) if return_outputs else self.check_finite(loss)

    @torch.no_grad()
    def precompute_ref_logps(self) -> None:
        """Stores the original's log-probabilities beside the forget rows: no reference forward in any step."""
        rows = self.train_dataset.forget
        size = self.args.per_device_train_batch_size
        found: list[list[float]] = []
        with original(self.model) as model, self.accelerator.autocast(), progress_bar() as progress:
            bar = progress.add_task("reference log-probabilities", total=len(rows))
            for start in range(0, len(rows), size):
                batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
                tensors = {name: value.to(model.device) for name, value in pad_rows(batch, 0).items()}
                logps = CompletionView(model, **tensors).logps.tolist()
                found += [row[: len(each["input_ids"]) - 1] for row, each in zip(logps, batch, strict=True)]
                progress.advance(bar, len(batch))
        self.train_dataset.forget = rows.add_column("ref_logps", found)


def tokenised(rows: Any, tokenizer: Any, max_length: int | None) -> Dataset:
    """A `Dataset` of `input_ids` and `labels`, from such a data set or from rows of any format."""
    if isinstance(rows, Dataset) and {"input_ids", "labels"} <= set(rows.column_names):
        return rows
    return Dataset.from_dict(token_columns(tokenizer, read_examples(rows, tokenizer), max_length=max_length))
