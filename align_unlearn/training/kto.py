"""`RefusalKTOTrainer`: TRL's `KTOTrainer` with refusals as desirable answers and the retain term of this project."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import KTOTrainer

from align_unlearn.data.examples import read_examples
from align_unlearn.modeling.fused_head import use_compact_head
from align_unlearn.training.configs import RefusalKTOConfig
from align_unlearn.training.dpo import preference_ids
from align_unlearn.training.paired import PairedTrainer
from align_unlearn.training.unlearn import tokenised


class RefusalKTOTrainer(PairedTrainer, KTOTrainer):  # type: ignore[misc]
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306) on unpaired answers, plus the retain term on retain rows.

    Each preference row becomes two: its chosen answer is desirable, its rejected one is not. TRL estimates KTO's own
    reference point from mismatched answers within a batch, so that the batch size matters here, and must be above 1.

    Args:
        model: the base model, without adapters.
        args: the configuration.
        train_dataset: preference rows: `prompt`, `chosen`, `rejected`.
        retain_dataset: rows to keep; may be none with `retain="none"`.
        processing_class: the tokenizer.
        peft_config: the adapter.
        callbacks: as in TRL.
    """

    def __init__(
        self,
        model: Any,
        args: RefusalKTOConfig,
        *,
        train_dataset: Any,
        retain_dataset: Any | None = None,
        processing_class: Any,
        peft_config: Any,
        callbacks: list[Any] | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        use_compact_head(self.model)
        rows = None if retain_dataset is None else tokenised(retain_dataset, processing_class, args.max_length)
        self.pair(rows, args.retain or "kl")

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, through the compact head; the first thing that TRL's `__init__` computes."""
        use_compact_head(self.model)
        return super().compute_ref_log_probs(model, inputs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's KTO loss and the retain term."""
        retain = inputs.pop("retain", None)
        forget = super().compute_loss(model, inputs, False, num_items_in_batch)
        with self.accelerator.autocast():
            loss = self.whole_loss(model, forget, retain)
        self.note("forget_loss", forget.detach())
        return (self.check_finite(loss), None) if return_outputs else self.check_finite(loss)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        """Two rows of our own tokens for each preference row, desirable and undesirable in turn."""
        if "prompt_ids" in dataset.column_names:
            pairs = list(dataset)
        else:
            pairs = [preference_ids(processing_class, each, args.max_length) for each in read_examples(dataset)]
        rows = [
            {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{kind}_ids"], "label": kind == "chosen"}
            for pair in pairs
            for kind in ("chosen", "rejected")
        ]
        answers = [row["completion_ids"] for row in rows]
        # the answer of another prompt, with which TRL estimates KTO's reference point
        mismatched = answers[-2:] + answers[:-2]
        return Dataset.from_list([{**row, "KL_completion_ids": ids} for row, ids in zip(rows, mismatched, strict=True)])
