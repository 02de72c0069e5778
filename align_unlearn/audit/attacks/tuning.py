"""Fine-tuning as an opponent would: on rows that were to be forgotten, on others of their kind, or on anything else.

The loop is the attacker's own (AdamW, constant rate, a few steps), on a copy; it shares nothing with our trainers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model

from align_unlearn.audit.answers import Record
from align_unlearn.audit.attacks.bench import Bench, copied, with_model
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import IGNORE, Tokens
from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.lm_head import LMHead, token_logps

Rows = Sequence[tuple[Example, Tokens]]
Weights = Literal["lora", "full"]
WEIGHTS = {"lora": "LoRA of rank 16", "full": "all weights"}
RATES = {"lora": 2e-4, "full": 2e-5}


def relearn(
    name: str,
    subject: Subject,
    bench: Bench,
    *,
    share: Literal["all", "half"] = "all",
    weights: Weights = "lora",
    steps: Sequence[int] = (2, 5, 10, 20),
    learning_rate: float | None = None,
    batch_size: int = 4,
) -> list[Record]:
    """Fine-tunes on forgotten rows and measures along the way.

    Args:
        share: `all` trains and measures on the same rows; `half` trains on every second row and measures the rest.
        weights: a `lora` adapter of rank 16, or `full`: all weights but the embeddings, in fp32.
        steps: after which it is measured, 0 being before.
        learning_rate: 2e-4 with LoRA and 2e-5 in full, where none is given.
        batch_size: rows a step.
    """
    taught, measured = bench.halves if share == "half" else (bench.forget, bench.forget)
    return _tuned(
        name, subject, bench, taught, measured, weights, steps, learning_rate, batch_size, given=share == "all"
    )


def benign(
    name: str,
    subject: Subject,
    bench: Bench,
    *,
    weights: Weights = "lora",
    steps: Sequence[int] = (10, 40),
    learning_rate: float | None = None,
    batch_size: int = 4,
) -> list[Record]:
    """Fine-tunes on rows that were to be kept: what any later user does, without meaning harm."""
    return _tuned(name, subject, bench, bench.kept, bench.forget, weights, steps, learning_rate, batch_size)


def _tuned(
    name: str,
    subject: Subject,
    bench: Bench,
    taught: Rows,
    measured: Rows,
    weights: Weights,
    steps: Sequence[int],
    learning_rate: float | None,
    batch_size: int,
    given: bool = False,
) -> list[Record]:
    if not taught or not measured:
        return []
    rate = learning_rate or RATES[weights]
    budget = f"{len(taught)} rows, {batch_size} a step, {WEIGHTS[weights]}, learning rate {rate:g}"
    changed = copied(subject, torch.float32)
    model = _trainable(changed.model, weights, bench.seed)
    records = []
    tokens = [each for _, each in taught]
    for step in tune(model, tokens, steps=steps, learning_rate=rate, batch_size=batch_size, seed=bench.seed):
        records += bench.measure(name, with_model(changed, model), f"{step} steps", step, budget, measured, given=given)
    return records


def _trainable(model: Any, weights: Weights, seed: int) -> Any:
    if weights == "full":
        model.requires_grad_(True)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.requires_grad_(False)
        return model
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def tune(
    model: Any, rows: Sequence[Tokens], *, steps: Sequence[int], learning_rate: float, batch_size: int, seed: int = 0
) -> Iterator[int]:
    """Trains on the rows' completions; yields after each number of steps named, with the model as it is then."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(max(steps) + 1):
        if step in steps:
            yield step
        if step == max(steps):
            return
        while len(order) < batch_size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        batch, order = [rows[at] for at in order[:batch_size]], order[batch_size:]
        model.train()
        with torch.enable_grad():
            loss = nll(model, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def nll(model: Any, rows: Sequence[Tokens]) -> torch.Tensor:
    """Mean negative log-likelihood of the rows' completions, nats a token."""
    batch = pad_rows([{"input_ids": each.input_ids, "labels": each.labels} for each in rows], 0)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    targets = batch["labels"][:, 1:]
    mask = targets != IGNORE
    hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])[:, :-1][mask]
    return -token_logps(hidden, targets[mask], LMHead.of(model)).mean()
