"""What passes through each layer of the model that is to be shipped: the inputs that rounding must keep in mind.

The texts are the run's own training rows without those that are audited, each with what the adapter model says to it:
requests to be refused and their refusals as well as rows that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align_unlearn.audit.subjects import Subject
from align_unlearn.config import Job
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.examples import Example, read_examples
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.files import sha256_of
from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.generate import generate
from align_unlearn.modeling.round_trip import linear_layers

ROWS = 64
"""Of each set."""
NEW_TOKENS = 40
FEWEST = 8
"""With fewer rows left that are not audited, all are used."""
BATCH = 8


@dataclass(frozen=True)
class Calibration:
    """What rounding is calibrated on.

    Attributes:
        rows: token ids of prompts with what is said to them.
        audited: some of them are audited too, since the run names no held-out rows: figures are then of rows that the
            rounding has seen.
    """

    rows: list[list[int]]
    audited: bool


def calibration_rows(job: Job, subject: Subject, sets: Mapping[str, Sequence[Example]]) -> Calibration:
    """Prompts of the training sets, each with the subject's greedy answer and, where it stays, with its own text.

    Args:
        job: whose training sets are read.
        subject: the adapter model.
        sets: the audited ones, whose rows are left out.

    Raises:
        UserError: a set cannot be read.
    """
    seen = {_key(each) for rows in sets.values() for each in rows}
    found, audited = list[list[int]](), False
    for source in (job.forget_dataset, job.neighbour_dataset, job.retain_dataset):
        if source:
            every = read_examples(
                source,
                subject.tokenizer,
                prefix_tokens=job.prefix_tokens,
                continuation_tokens=job.continuation_tokens,
            )
            unseen = [each for each in every if _key(each) not in seen]
            examples = (unseen if len(unseen) >= FEWEST else every)[:ROWS]
            audited = audited or len(unseen) < FEWEST
            found += _with_answers(subject, examples, source, own_texts=source != job.forget_dataset)
    return Calibration(found, audited)


def _with_answers(subject: Subject, examples: Sequence[Example], source: str, *, own_texts: bool) -> list[list[int]]:
    prompts = [prompt_ids(subject.tokenizer, example) for example in examples]
    with subject.speaking() as model:
        said = generate(model, subject.tokenizer, prompts, max_new_tokens=NEW_TOKENS, title=f"calibrating on {source}")
    rows = [prompt + answer.ids for prompt, answer in zip(prompts, said, strict=True)]
    texts = [
        prompt + list(subject.tokenizer(example.completion, add_special_tokens=False).input_ids)
        for prompt, example in zip(prompts, examples, strict=True)
        if example.completion
    ]
    return rows + (texts if own_texts else [])


def _key(example: Example) -> str:
    return sha256_of([example.prompt, example.completion])


@torch.no_grad()
def moments(model: Any, rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """By linear layer of a plain model, (in, in) Σ x xᵀ over its inputs x, fp32; shared where they are the same."""
    layers = linear_layers(model)
    found: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    last: tuple[Any, str] = (None, "")
    mask = torch.empty(0)

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], __: Any) -> None:
            nonlocal last
            if inputs[0] is not last[0]:
                last = (inputs[0], name)
            if owner.setdefault(name, last[1]) == name:
                states = inputs[0][mask].float()
                sums = states.T @ states
                found[name] = found[name] + sums if name in found else sums

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
    return {name: found[owner[name]] for name in layers}
