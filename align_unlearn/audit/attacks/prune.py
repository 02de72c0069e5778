"""The smallest weights of every linear layer set to zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from align_unlearn.audit.answers import Record
from align_unlearn.audit.attacks.bench import Bench, copied
from align_unlearn.audit.subjects import Subject
from align_unlearn.modeling.round_trip import linear_layers


def attack(
    name: str, subject: Subject, bench: Bench, *, shares: Sequence[float] = (0.1, 0.2, 0.3, 0.5)
) -> list[Record]:
    """Magnitude pruning, layer by layer."""
    records = []
    for share in shares:
        changed = copied(subject)
        prune(changed.model, share)
        records += bench.measure(name, changed, f"{share:.0%}", share, "smallest weights of each linear layer, zeroed")
    return records


@torch.no_grad()
def prune(model: torch.nn.Module, share: float) -> None:
    """Sets the `share` of smallest magnitudes of every linear layer to zero."""
    for layer in linear_layers(model).values():
        size = layer.weight.float().abs().flatten()
        count = int(share * size.numel())
        if count:
            layer.weight.masked_fill_(layer.weight.float().abs() <= size.kthvalue(count).values, 0.0)
