"""`RefusalDPOTrainer`: TRL's `DPOTrainer` with refusals as the chosen answers and the retain term of this project."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer

from align_unlearn.data.examples import Example, read_examples
from align_unlearn.data.tokens import check_length, completion_ids, prompt_ids, tokenise
from align_unlearn.errors import UserError
from align_unlearn.modeling.fused_head import use_compact_head
from align_unlearn.training.configs import RefusalDPOConfig
from align_unlearn.training.paired import PairedTrainer
from align_unlearn.training.unlearn import tokenised


class RefusalDPOTrainer(PairedTrainer, DPOTrainer):  # type: ignore[misc]
    """DPO on (prompt, chosen refusal, rejected answer) rows, plus the retain term on retain rows.

    The reference of DPO is the original: the base with adapters off.

    Args:
        model: the base model, without adapters.
        args: the configuration; `loss_type` and `loss_weights` are TRL's (`["sigmoid", "sft"]` holds up the refusal).
        train_dataset: preference rows: `prompt`, `chosen`, `rejected`.
        retain_dataset: rows to keep; may be none with `retain="none"`.
        processing_class: the tokenizer.
        peft_config: the adapter.
        callbacks: as in TRL.
    """

    def __init__(
        self,
        model: Any,
        args: RefusalDPOConfig,
        *,
        train_dataset: Any,
        retain_dataset: Any | None = None,
        processing_class: Any,
        peft_config: Any,
        callbacks: list[Any] | None = None,
    ) -> None:
        if args.use_weighting:
            raise UserError("use_weighting needs figures that are not computed here.", where="use_weighting")
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
        """TRL's DPO loss and the retain term."""
        retain, is_forget = inputs.pop("retain", None), inputs.pop("is_forget", None)
        forget = super().compute_loss(model, inputs, False, num_items_in_batch)
        with self.accelerator.autocast():
            loss = self.whole_loss(model, forget, retain)
        self.note("forget_loss", forget.detach())
        if model.training:
            self._note_rejected_nll(inputs, is_forget)
        return (self.check_finite(loss), None) if return_outputs else self.check_finite(loss)

    def _note_rejected_nll(self, inputs: dict[str, Any], is_forget: Tensor | None) -> None:
        """Logs the NLL of the rejected answers of forget rows, nats a token: a mean over rows of a mean over tokens."""
        rejected = self.compact_head.last_log_probs.chunk(2)[1]
        tokens = inputs["completion_mask"][:, 1:].chunk(2)[1].sum(-1).clamp(min=1)
        nll = -rejected.sum(-1) / tokens
        nll = nll if is_forget is None else nll[is_forget]
        if nll.numel():
            self.note("forget_nll", nll.mean())

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        """Our own tokens: one EOS behind each answer and nothing behind that, and no row cut silently."""
        if "prompt_ids" in dataset.column_names:
            return dataset
        rows = [preference_ids(processing_class, example, args.max_length) for example in read_examples(dataset)]
        return Dataset.from_list(rows)


def without_router_loss(args: Any) -> None:
    """Switches off the auxiliary loss of mixture-of-experts models, which TRL takes from the model's configuration.

    Raises:
        UserError: it was asked for.
    """
    if args.router_aux_loss_coef:
        raise UserError(
            "The router's auxiliary loss is not computed here: the base is frozen.", where="router_aux_loss_coef"
        )
    args.router_aux_loss_coef = 0.0


def preference_ids(
    tokenizer: Any, example: Example, max_length: int | None, *, chosen_ends: bool = True
) -> dict[str, list[int]]:
    """A preference row as `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Args:
        chosen_ends: whether the chosen answer ends by itself; of the rejected one `example.ends` says so.

    Raises:
        UserError: the row has no chosen answer, or is longer than `max_length`.
    """
    if example.chosen is None:
        raise UserError("A preference row needs a chosen answer.", where=example.where, fix="add a column chosen")
    rejected = tokenise(tokenizer, example, max_length=max_length)
    chosen = completion_ids(tokenizer, replace(example, ends=chosen_ends), example.chosen)
    check_length(replace(rejected, completion_ids=chosen), max_length, example.where)
    return {
        "prompt_ids": prompt_ids(tokenizer, example),
        "chosen_ids": chosen,
        "rejected_ids": rejected.completion_ids,
    }
