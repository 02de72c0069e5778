"""What is left of an adapter's update in each layer once the layer has been rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Effect:
    """One layer's.

    Attributes:
        share: ⟨Q(W + Δ) − Q(W), Δ⟩ / ‖Δ‖²: 1 is all of the update, 0 none.
        cosine: of Q(W + Δ) − Q(W) with Δ on the adapter's row space: 1 is the update and nothing else there.
        moved: share of the layer's values that differ between Q(W + Δ) and Q(W).
    """

    share: float
    cosine: float
    moved: float


@torch.no_grad()
def effect(before: Tensor, after: Tensor, update: Tensor, rows: Tensor) -> Effect:
    """The effect that is left.

    Args:
        before: Q(W), (out, in).
        after: Q(W + Δ).
        update: Δ.
        rows: (r, in) whose span holds the rows of Δ: LoRA's A.
    """
    change, wanted = (after - before).double(), update.double()
    basis = torch.linalg.qr(rows.double().T).Q
    within = change @ basis
    aim = wanted @ basis
    scale = wanted.square().sum().clamp(min=1e-30)
    norm = (within.norm() * aim.norm()).clamp(min=1e-30)
    return Effect(
        share=float((change * wanted).sum() / scale),
        cosine=float((within * aim).sum() / norm),
        moved=float((change != 0).double().mean()),
    )
