"""A few vectors put before every prompt, optimised for a few steps so that the forgotten text comes.

They are trained on every second row; the rest shows whether they bring back what was forgotten, or only what they have
learnt themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align_unlearn.audit.answers import Record
from align_unlearn.audit.attacks.bench import Bench, about, copied
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.tokens import IGNORE, Tokens
from align_unlearn.modeling.lm_head import LMHead, token_logps


def attack(
    name: str,
    subject: Subject,
    bench: Bench,
    *,
    vectors: int = 8,
    steps: Sequence[int] = (10, 30),
    learning_rate: float = 1e-2,
    batch_size: int = 4,
) -> list[Record]:
    """The probability of held-out texts before, and after each number of steps."""
    taught, measured = bench.halves
    if not taught or not measured:
        return []
    budget = f"{vectors} vectors, {len(taught)} rows, {batch_size} a step, learning rate {learning_rate:g}"
    changed = copied(subject)
    model = changed.model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(bench.seed)
    start = torch.randint(embedding.weight.shape[0], (vectors,), generator=generator).to(embedding.weight.device)
    # through the module, which may scale what it looks up
    soft = embedding(start).detach().float().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([soft], lr=learning_rate)
    records: list[Record] = []
    for step in range(max(steps) + 1):
        if step == 0 or step in steps:
            with torch.no_grad():
                for example, tokens in measured:
                    logps = soft_logps(model, soft if step else soft[:0], [tokens])
                    made = about(name, subject, example, f"{step} steps", step, budget)
                    records.append({**made, "probability": float(logps.mean().exp())})
        if step < max(steps):
            picked = torch.randint(len(taught), (batch_size,), generator=generator).tolist()
            loss = -soft_logps(model, soft, [taught[at][1] for at in picked]).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return records


def soft_logps(model: Any, soft: Tensor, rows: Sequence[Tokens]) -> Tensor:
    """(N,) log-probabilities of the rows' completion tokens behind the (k, H) vectors and their prompts."""
    batch = pad_rows([{"input_ids": each.input_ids, "labels": each.labels} for each in rows], 0)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    words = model.get_input_embeddings()(batch["input_ids"])
    before = soft.to(words.device, words.dtype).expand(len(rows), -1, -1)
    mask = torch.cat([torch.ones_like(batch["input_ids"][:, :1]).expand(-1, len(soft)), batch["attention_mask"]], 1)
    states = model.base_model(
        inputs_embeds=torch.cat([before, words], 1), attention_mask=mask, use_cache=False
    ).last_hidden_state[:, len(soft) :]
    targets = batch["labels"][:, 1:]
    labelled = targets != IGNORE
    return token_logps(states[:, :-1][labelled], targets[labelled], LMHead.of(model))
