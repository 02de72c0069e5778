"""Retain regularisers: per-row losses on retain rows, of the same shape as forget objectives."""

from __future__ import annotations

from torch import Tensor

from align_unlearn.objectives.view import CompletionView


def kl(view: CompletionView) -> Tensor:
    """Exact KL(original ‖ policy), a mean over completion tokens (Maini et al. 2024, arXiv:2401.06121). (B,) nats."""
    return view.kl.sum(-1) / view.lengths


def nll(view: CompletionView) -> Tensor:
    """NLL, a mean over completion tokens (graddiff, Liu et al. 2022, arXiv:2203.12817). (B,) nats."""
    return -view.logps.sum(-1) / view.lengths
