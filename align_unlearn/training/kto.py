"""`RefusalKTOTrainer`: TRL's `KTOTrainer` with refusals as desirable answers and the retain term of this project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor
from trl import KTOTrainer

from align_unlearn.data.examples import read_examples
from align_unlearn.errors import UserError
from align_unlearn.modeling.fused_head import use_compact_head
from align_unlearn.training.configs import RefusalKTOConfig
from align_unlearn.training.dpo import preference_ids, without_router_loss
from align_unlearn.training.paired import PairedTrainer
from align_unlearn.training.unlearn import tokenised


class RefusalKTOTrainer(PairedTrainer, KTOTrainer):  # type: ignore[misc]
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306) on unpaired answers, plus the retain term on retain rows.

    Each preference row becomes two: its chosen answer is desirable, its rejected one is not. TRL estimates KTO's own
    reference point from the answers of a batch put behind other prompts, so that the batch size matters here.

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
        without_router_loss(args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        self.compact_head = use_compact_head(self.model)
        rows = None if retain_dataset is None else tokenised(retain_dataset, processing_class, args.max_length)
        self.pair(rows, args.retain or "kl")

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, through the compact head; the first thing that TRL's `__init__` computes."""
        self.compact_head = use_compact_head(self.model)
        return super().compute_ref_log_probs(model, inputs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's KTO loss and the retain term."""
        retain, is_forget = inputs.pop("retain", None), inputs.pop("is_forget", None)
        forget = super().compute_loss(model, inputs, False, num_items_in_batch)
        with self.accelerator.autocast():
            loss = self.whole_loss(model, forget, retain)
        self.note("forget_loss", forget.detach())
        if model.training:
            self._note_forget_nll(inputs, is_forget)
        return (self.check_finite(loss), None) if return_outputs else self.check_finite(loss)

    def _note_forget_nll(self, inputs: dict[str, Any], is_forget: Tensor | None) -> None:
        """Logs the NLL of the undesirable answers of forget rows, nats a token."""
        rows = ~inputs["label"].bool() if is_forget is None else ~inputs["label"].bool() & is_forget
        if rows.any():
            tokens = inputs["completion_mask"][:, 1:].sum(-1).clamp(min=1)
            self.note("forget_nll", (-self.compact_head.last_log_probs.sum(-1) / tokens)[rows].mean())

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        """Two rows of our own tokens for each preference row, desirable and undesirable in turn."""
        if "prompt_ids" in dataset.column_names:
            pairs = list(dataset)
        else:
            pairs = [preference_ids(processing_class, each, args.max_length) for each in read_examples(dataset)]
        rows = [
            {
                "prompt_ids": pair["prompt_ids"],
                "completion_ids": pair[f"{kind}_ids"],
                "label": kind == "chosen",
                "forget": pair.get("forget", True),
            }
            for pair in pairs
            for kind in ("chosen", "rejected")
        ]
        return Dataset.from_list([{**row, "KL_completion_ids": mismatched(rows, at)} for at, row in enumerate(rows)])


def mismatched(rows: Sequence[dict[str, Any]], at: int) -> list[int]:
    """The next answer of the same kind that belongs to another prompt: TRL estimates KTO's reference point with it.

    Raises:
        UserError: all rows have one prompt.
    """
    own = rows[at]
    for step in range(1, len(rows)):
        other = rows[(at + step) % len(rows)]
        if other["label"] == own["label"] and other["prompt_ids"] != own["prompt_ids"]:
            return list(other["completion_ids"])
    raise UserError("KTO needs rows of at least two prompts.", where="forget_dataset")
