"""The update multiplied: less of it, or more, along the line from the base to the candidate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from align_unlearn.audit.answers import Record
from align_unlearn.audit.attacks.bench import Bench, copied
from align_unlearn.audit.subjects import Subject


def attack(
    name: str, subject: Subject, bench: Bench, *, factors: Sequence[float] = (0.0, 0.5, 0.75, 1.25, 1.5)
) -> list[Record]:
    """θ = θ_base + α (θ − θ_base) for each factor α. Only the candidate has an update.

    0 is the base itself: what an opponent has who drops the adapter.
    """
    if subject.name != "candidate":
        return []
    records = []
    for factor in factors:
        changed = copied(subject)
        towards(changed.model, copied(bench.base).model, factor)
        budget = "θ_base + α (θ − θ_base)"
        records += bench.measure(name, changed, f"α {factor:g}", factor, budget, given=factor == 0)
    return records


@torch.no_grad()
def towards(model: torch.nn.Module, base: torch.nn.Module, factor: float) -> None:
    """Moves a model along the line from `base` through itself, in place."""
    before = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        origin = before[name].to(parameter.device, torch.float32)
        parameter.copy_(origin + factor * (parameter.float() - origin))
