"""Given texts, read once: everything that teacher-forced metrics need comes from one forward pass a subject.

Of each token of a text: its log-probability, whether it was the likeliest, the mean and spread of the log-probabilities
over the vocabulary (Min-K%++), and the exact KL to the base. Logits are made tile by tile and never kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align_unlearn.audit.subjects import Subject
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.tokens import IGNORE, Tokens
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.lm_head import TILE


@dataclass(frozen=True)
class Reading:
    """What one subject makes of one completion of n tokens. All tensors are (n,), on the CPU.

    Attributes:
        logps: log-probability of each token, nats.
        hits: whether the token was the likeliest one.
        mean: mean of the log-probability over the vocabulary, under the model.
        std: its standard deviation.
        kl: exact KL(base ‖ subject), nats.
    """

    logps: Tensor
    hits: Tensor
    mean: Tensor
    std: Tensor
    kl: Tensor


def read_texts(
    subjects: Mapping[str, Subject], rows: Sequence[Tokens], batch_size: int = 16
) -> dict[str, list[Reading]]:
    """All texts, in batches of like length; the readings in the order given."""
    order = sorted(range(len(rows)), key=lambda at: len(rows[at].input_ids))
    found: dict[str, dict[int, Reading]] = {name: {} for name in subjects}
    with progress_bar() as progress:
        bar = progress.add_task(f"reading with {', '.join(subjects)}", total=len(rows))
        for start in range(0, len(order), batch_size):
            piece = order[start : start + batch_size]
            for name, readings in read_batch(subjects, [rows[at] for at in piece]).items():
                found[name] |= dict(zip(piece, readings, strict=True))
            progress.advance(bar, len(piece))
    return {name: [own[at] for at in range(len(rows))] for name, own in found.items()}


@torch.no_grad()
def read_batch(subjects: Mapping[str, Subject], rows: Sequence[Tokens]) -> dict[str, list[Reading]]:
    """One batch of texts, read once by each subject. KL is to the subject `base`, and nan where there is none."""
    batch = pad_rows([{"input_ids": each.input_ids, "labels": each.labels} for each in rows], 0)
    targets = batch["labels"][:, 1:]
    mask = targets != IGNORE
    counts = mask.sum(-1).tolist()
    labels = targets[mask]
    hidden = {name: subject.hidden(batch)[:, :-1][mask] for name, subject in subjects.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in subjects}
    for start in range(0, len(labels), TILE):
        piece = slice(start, start + TILE)
        base = None
        if "base" in subjects:
            base = subjects["base"].head.logits(hidden["base"][piece]).log_softmax(-1)
        for name, subject in subjects.items():
            logps = (
                base
                if name == "base" and base is not None
                else subject.head.logits(hidden[name][piece]).log_softmax(-1)
            )
            found[name].append(_figures(logps, labels[piece].to(logps.device), base).cpu())
    return {name: _split(torch.cat(tiles, dim=1), counts) for name, tiles in found.items()}


def _figures(logps: Tensor, labels: Tensor, base: Tensor | None) -> Tensor:
    """(n, V) log-probabilities → (5, n): those of the labels, hits, mean, std, KL to the base's."""
    p = logps.exp()
    mean = (p * logps).sum(-1)
    std = ((p * logps.square()).sum(-1) - mean.square()).clamp(min=0).sqrt()
    if base is None:
        kl = torch.full_like(mean, float("nan"))
    else:
        base = base.to(logps.device)
        kl = (base.exp() * (base - logps)).sum(-1)
    own = logps.gather(-1, labels[:, None])[:, 0]
    return torch.stack([own, (logps.argmax(-1) == labels).to(own.dtype), mean, std, kl])


def _split(figures: Tensor, counts: Sequence[int]) -> list[Reading]:
    return [Reading(row[0], row[1] > 0.5, row[2], row[3], row[4]) for row in torch.split(figures, list(counts), dim=1)]
