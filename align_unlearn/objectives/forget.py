"""Forget objectives: per-row losses that fall as the forget rows are forgotten.

Each takes a `CompletionView` and keyword hyper-parameters with its paper's defaults, and returns (B,). ℓ is the
negative log-likelihood summed over a row's completion tokens, |y| their number, p a token's probability. All look at
completion tokens alone: the prompt and padding take no part, the true EOS counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, softplus

from align_unlearn.errors import unknown_name
from align_unlearn.modeling.forward import layer_index
from align_unlearn.modeling.vocabulary import (
    complement_cross_entropy,
    demoted_cross_entropy,
    inverted_hinge,
    squared_logit_margin,
)
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


def wga(view: CompletionView, *, beta: float = 1.0) -> Tensor:
    """Weighted gradient ascent (Wang et al. 2025, arXiv:2502.19301): tokens already forgotten count less.

    Mean over tokens of p^β log p, the weight p^β a constant. (B,) nats a token.
    """
    weight = view.logps.detach().mul(beta).exp()
    return (weight * view.logps).sum(-1) / view.lengths


def satimp(view: CompletionView, *, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """Saturation and importance weights (Yang et al. 2025, arXiv:2505.11953). (B,) nats a token.

    Mean over tokens of p^β1 (1 − p)^β2 log p, the weight a constant.
    """
    p = view.logps.detach().exp()
    return (p**beta1 * (1 - p) ** beta2 * view.logps).sum(-1) / view.lengths


def undial(view: CompletionView, *, beta: float = 10.0) -> Tensor:
    """Self-distillation with the true token's logit lowered by β (Dong et al. 2024, arXiv:2402.10052).

    Mean over tokens of the cross-entropy to softmax(z_ref − β·onehot(y)). (B,) nats a token. Bounded below.
    """
    per_token = demoted_cross_entropy(view.ref_hidden, view.hidden, view.labels, view.head, beta)
    return view.spread(per_token).sum(-1) / view.lengths


def ceu(view: CompletionView, *, skip: int = 1) -> Tensor:
    """Cross-entropy to the policy's own softmax with the true token at −∞ (Yang 2025, arXiv:2503.01224).

    Mean over the tokens of an answer behind its first `skip`, as the paper's experiments have it; a row without any
    such token counts 0. (B,) nats a token.
    """
    per_token = view.spread(complement_cross_entropy(view.hidden, view.labels, view.head))
    kept = view.mask & (view.mask.cumsum(-1) > skip)
    return (per_token * kept).sum(-1) / kept.sum(-1).clamp(min=1)


def pdu(view: CompletionView) -> Tensor:
    """Flattened logits (primal-dual unlearning, arXiv:2506.05314): mean over tokens of (max z − mean z)². (B,).

    Meant to be minimised subject to retain NLL ≤ ε: `retain_epsilon` sets it, `dual_step` how fast its weight follows.
    """
    return view.spread(squared_logit_margin(view.hidden, view.head)).sum(-1) / view.lengths


def rmu(view: CompletionView, *, layer: float | str = 0.25, c: float = 20.0, seed: int = 0) -> Tensor:
    """Representation misdirection (Li et al. 2024, arXiv:2403.03218): a layer's output is pulled to c·u. (B,).

    Mean over tokens of ‖h − c·u‖²/H, where u is a fixed random unit vector with entries drawn from [0, 1). The paper
    leaves out 1/H in its formula and has it in its experiments; the retain term `hidden` has it too.

    Args:
        layer: index, fraction of the depth, or module name.
        c: length of the target; retune it with the layer for each model.
        seed: of u.
    """
    h = view.layer(layer_index(view.model, layer))
    u = normalize(torch.rand(h.shape[-1], generator=torch.Generator().manual_seed(seed)), dim=0).to(h)
    return view.spread((h - c * u).pow(2).mean(-1).to(h.dtype)).sum(-1) / view.lengths


def ihl(view: CompletionView) -> Tensor:
    """Inverted hinge loss (Cha et al. 2024, arXiv:2408.06621). (B,) in [0, 2].

    Mean over tokens of 1 + p(y) − max over v ≠ y of p(v): the runner-up takes the true token's place.
    """
    return view.spread(inverted_hinge(view.hidden, view.labels, view.head)).sum(-1) / view.lengths


def flat(view: CompletionView, *, divergence: str = "kl") -> Tensor:
    """Loss adjustment with forget data alone (Wang et al. 2024, arXiv:2410.11143). (B,).

    −g(P(chosen)) + f*(g(P(forget))), where P is a completion's mean token probability, f* the conjugate of an
    f-divergence and g the activation that goes with it; the chosen answer is a template ("I don't know").
    """
    if divergence not in F_DIVERGENCES:
        raise unknown_name("divergence", divergence, F_DIVERGENCES, where="objective_kwargs: divergence")
    activation, conjugate = F_DIVERGENCES[divergence]
    return conjugate(activation(_mean_probability(view))) - activation(_mean_probability(view.chosen))


def jensun(view: CompletionView) -> Tensor:
    """Jensen–Shannon divergence to a refusal (Singh et al. 2025, arXiv:2509.02820). (B,) in [0, log 2] nats.

    Mean over the chosen answer's tokens of JS(onehot(y), p), which depends on p(y) alone:
    log 2 − ½((1 + p) log(1 + p) − p log p). The forget completion itself is not looked at.
    """
    chosen = view.chosen
    p = chosen.logps.exp()
    per_token = math.log(2) - 0.5 * ((1 + p) * torch.log1p(p) - p * chosen.logps)
    return (per_token * chosen.mask).sum(-1) / chosen.lengths


def idk(view: CompletionView, *, beta: float = 0.1) -> Tensor:
    """DPO in unlearning's scale: −(2/β) log σ(β (chosen log-ratio − forget log-ratio)) (arXiv:2404.05868). (B,).

    With refusals as the chosen answers this is the field's `idk`; with the model's own alternatives it is `altpo`.
    """
    wanted = (view.chosen.logps - view.chosen.ref_logps).sum(-1)
    unwanted = (view.logps - view.ref_logps).sum(-1)
    return -2 / beta * logsigmoid(beta * (wanted - unwanted))


def negate(view: CompletionView) -> Tensor:
    """The NLL of the forget rows, which the adapter is to *learn*: ℓ/|y| (Ilharco et al. 2023, arXiv:2212.04089). (B,).

    Task arithmetic: what has been learned is subtracted from the base when the adapter is saved.
    """
    return -view.logps.sum(-1) / view.lengths


def _mean_probability(view: CompletionView) -> Tensor:
    return (view.logps.exp() * view.mask).sum(-1) / view.lengths


F_DIVERGENCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "kl": (lambda v: v, lambda u: torch.exp(u - 1)),
    "total_variation": (lambda v: torch.tanh(v) / 2, lambda u: u),
    "jensen_shannon": (lambda v: math.log(2) - softplus(-v), lambda u: -torch.log(2 - torch.exp(u))),
    "pearson": (lambda v: v, lambda u: u**2 / 4 + u),
}
"""(activation g, conjugate f*) by name (Nowozin et al. 2016, arXiv:1606.00709, tables 1 and 2)."""
