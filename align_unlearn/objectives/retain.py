"""Retain regularisers: per-row losses on retain rows, of the same shape as forget objectives."""

from __future__ import annotations

from torch import Tensor

from align_unlearn.modeling.forward import layer_index
from align_unlearn.modeling.vocabulary import jensen_shannon
from align_unlearn.objectives.view import CompletionView


def kl(view: CompletionView) -> Tensor:
    """Exact KL(original ‖ policy), a mean over completion tokens (Maini et al. 2024, arXiv:2401.06121). (B,) nats."""
    return view.kl.sum(-1) / view.lengths


def nll(view: CompletionView) -> Tensor:
    """NLL, a mean over completion tokens (graddiff, Liu et al. 2022, arXiv:2203.12817). (B,) nats."""
    return -view.logps.sum(-1) / view.lengths


def kl_nll(view: CompletionView) -> Tensor:
    """The sum of `kl` and `nll`. (B,) nats."""
    return kl(view) + nll(view)


def js(view: CompletionView) -> Tensor:
    """Jensen–Shannon divergence of original and policy, a mean over tokens (jensun, arXiv:2509.02820). (B,) nats."""
    return view.spread(jensen_shannon(view.ref_hidden, view.hidden, view.head)).sum(-1) / view.lengths


def hidden(view: CompletionView, *, layer: float | str = 0.25) -> Tensor:
    """‖h − h_ref‖²/H at a layer's output, a mean over tokens (rmu, arXiv:2403.03218). (B,)."""
    at = layer_index(view.model, layer)
    squares = (view.layer(at) - view.ref_layer(at)).pow(2).mean(-1)
    return view.spread(squares).sum(-1) / view.lengths
