"""`UnlearnTrainer`: any forget objective with a retain term, on the seam of TRL's `SFTTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTTrainer

from align_unlearn.data.batches import pad_rows
from align_unlearn.data.examples import read_examples
from align_unlearn.data.tokens import token_columns
from align_unlearn.errors import UserError
from align_unlearn.objectives.table import bind, check_needs, forget_objective
from align_unlearn.objectives.view import CompletionView
from align_unlearn.training.configs import UnlearnConfig
from align_unlearn.training.paired import PairedTrainer
from align_unlearn.training.ref_cache import with_ref_logps


class UnlearnTrainer(PairedTrainer, SFTTrainer):  # type: ignore[misc]
    """Minimises forget_coef · forget(forget rows) + retain term(retain rows) on LoRA adapters.

    The loss is a mean over rows, which gradient accumulation averages (a last micro-batch that is not full counts as
    much as a full one, as in transformers).

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
        self.entry = entry = forget_objective(objective)
        settings = args.hyper_parameters()
        self.objective = bind(entry, objective, settings)
        check_needs(entry, objective, args)
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__init__(
            model=model,
            args=args,
            train_dataset=tokenised(train_dataset, processing_class, args.max_length, chosen=entry.chosen),
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            data_collator=lambda rows: pad_rows(rows, processing_class.pad_token_id),
        )
        self.model_accepts_loss_kwargs = False
        retain = args.retain or entry.retain
        rows = None if retain_dataset is None else tokenised(retain_dataset, processing_class, args.max_length)
        self.pair(rows, retain, settings)
        if entry.reference and args.precompute_ref_log_probs:
            self.precompute_ref_logps()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the forget objective and the retain term, a mean over rows."""
        retain, chosen = inputs.pop("retain", None), inputs.pop("chosen", None)
        with self.accelerator.autocast():
            view = CompletionView(model, **inputs, chosen=None if chosen is None else CompletionView(model, **chosen))
            forget = self.objective(view).mean()
            loss = self.whole_loss(model, forget, retain)
        self.note("forget_loss", forget)
        self._note_forget_nll(view)
        return (self.check_finite(loss), None) if return_outputs else self.check_finite(loss)

    @property
    def forget_coef(self) -> float:
        """The configuration's, else that of the objective's paper."""
        given = self.args.forget_coef
        return self.entry.forget_coef if given is None else float(given)

    @torch.no_grad()
    def _note_forget_nll(self, view: CompletionView) -> None:
        """Logs the NLL of the forget rows, nats a token, unless it would take a forward pass that nobody asked for."""
        if "hidden" in vars(view) or self.args.forget_target is not None:
            self.note("forget_nll", (-view.logps.sum(-1) / view.lengths).mean())

    def precompute_ref_logps(self) -> None:
        """Puts the original's log-probabilities beside the forget rows: no reference forward in any step."""
        rows = self.train_dataset.forget
        kept = [{**row, "ref_logps": logps} for row, logps in zip(rows, self._ref_logps(rows, "forget"), strict=True)]
        if self.entry.chosen:
            wanted = Dataset.from_list(list(rows["chosen"]))
            for row, logps in zip(kept, self._ref_logps(wanted, "chosen"), strict=True):
                row["chosen"] = {**row["chosen"], "ref_logps": logps}
        self.train_dataset.forget = Dataset.from_list(kept)

    def _ref_logps(self, rows: Dataset, name: str) -> list[list[float]]:
        with self.accelerator.autocast():
            folder, size = Path(self.args.output_dir) / "cache", self.args.per_device_train_batch_size
            return with_ref_logps(rows, self.model, folder, name=name, batch_size=size)


def tokenised(rows: Any, tokenizer: Any, max_length: int | None, *, chosen: bool = False) -> Dataset:
    """A `Dataset` of `input_ids` and `labels`, from such a data set or from rows of any format.

    Args:
        chosen: put the chosen answers beside them, in a column `chosen` of the same form.
    """
    if isinstance(rows, Dataset) and {"input_ids", "labels"} <= set(rows.column_names):
        if chosen and "chosen" not in rows.column_names:
            raise UserError("The objective needs a column `chosen`.", where="train_dataset")
        return rows
    examples = read_examples(rows, tokenizer)
    return Dataset.from_dict(token_columns(tokenizer, examples, max_length=max_length, chosen=chosen))
