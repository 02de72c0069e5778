"""What passes through each layer of the model that is to be shipped: the inputs that rounding must keep in mind.

The texts are the run's own training rows (never the audited ones), each with what the adapter model says to it:
requests to be refused and their refusals as well as rows that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align_unlearn.audit.subjects import Subject
from align_unlearn.config import Job
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.examples import read_examples
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.generate import generate
from align_unlearn.modeling.round_trip import linear_layers

ROWS = 64
"""Of each set."""
NEW_TOKENS = 40
BATCH = 8


def calibration_rows(job: Job, subject: Subject) -> list[list[int]]:
    """Token ids of prompts, each with the subject's greedy answer and, where the row has one, with its own text.

    Raises:
        UserError: a set cannot be read.
    """
    rows = []
    for source in (job.forget_dataset, job.neighbour_dataset, job.retain_dataset):
        if source:
            examples = read_examples(
                source,
                subject.tokenizer,
                prefix_tokens=job.prefix_tokens,
                continuation_tokens=job.continuation_tokens,
            )[:ROWS]
            prompts = [prompt_ids(subject.tokenizer, example) for example in examples]
            with subject.speaking() as model:
                said = generate(
                    model, subject.tokenizer, prompts, max_new_tokens=NEW_TOKENS, title=f"calibrating on {source}"
                )
            rows += [prompt + answer.ids for prompt, answer in zip(prompts, said, strict=True)]
            rows += [
                prompt + list(subject.tokenizer(example.completion, add_special_tokens=False).input_ids)
                for prompt, example in zip(prompts, examples, strict=True)
                if example.completion and source != job.forget_dataset
            ]
    return rows


@torch.no_grad()
def moments(model: Any, rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """By linear layer of a plain model, (in, in) Σ x xᵀ over its inputs x, fp64."""
    layers = linear_layers(model)
    found = {
        name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=layer.weight.device)
        for name, layer in layers.items()
    }
    mask = torch.empty(0)

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], __: Any) -> None:
            states = inputs[0][mask].double()
            found[name].addmm_(states.T, states)

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        for start in range(0, len(rows), BATCH):
            piece = [{"input_ids": row, "labels": row} for row in rows[start : start + BATCH]]
            batch = {name: value.to(model.device) for name, value in pad_rows(piece, 0).items()}
            mask = batch["attention_mask"].bool()
            hidden_states(model, batch["input_ids"], batch["attention_mask"])
    finally:
        for hook in hooks:
            hook.remove()
    return found
