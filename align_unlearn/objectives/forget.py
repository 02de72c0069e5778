"""Forget objectives: per-row losses that fall as the forget rows are forgotten.

Each takes a `CompletionView` and keyword hyper-parameters with its paper's defaults, and returns (B,). ℓ is the
negative log-likelihood summed over a row's completion tokens, |y| their number.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from align_unlearn.objectives.view import CompletionView


def ga(view: CompletionView) -> Tensor:
    """Gradient ascent: −ℓ/|y| (Jang et al. 2023, arXiv:2210.01504, eq. 1, a mean over tokens). (B,) nats a token.

    Unbounded: without a retain term and an early stop it ruins the model.
    """
    return view.logps.sum(-1) / view.lengths


def npo(view: CompletionView, *, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation (Zhang et al. 2024, arXiv:2404.05868, eq. 3). (B,) nats.

    −(2/β) log σ(−β (log π − log π_ref)) with log-probabilities summed over the completion. It starts at (2/β) log 2.
    """
    return -2 / beta * logsigmoid(-beta * (view.logps - view.ref_logps).sum(-1))


def simnpo(view: CompletionView, *, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """NPO without a reference, normalised by length (Fan et al. 2024, arXiv:2410.07163, eq. 4). (B,).

    −(2/β) log σ(β (ℓ/|y| − δ)).
    """
    return -2 / beta * logsigmoid(beta * (-view.logps.sum(-1) / view.lengths - delta))
