"""Scalars over the whole vocabulary, one a position, for objectives that need more than a token's probability.

Built as `token_logps` and `kl_divergence` are: tile by tile through the frozen LM head, gradient stored in the forward
pass, so that memory grows with tokens × hidden and never with tokens × vocabulary. Every function takes (N, H) final
hidden states and returns (N,), at least fp32, differentiable in the policy's `hidden`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from align_unlearn.modeling.lm_head import TILE, LMHead, per_position


def demoted_cross_entropy(
    ref_hidden: Tensor, hidden: Tensor, labels: Tensor, head: LMHead, beta: float, tile: int = TILE
) -> Tensor:
    """Cross-entropy to softmax(z_ref − β·onehot(y)): the reference with the true token's logit lowered by β. Nats.

    Args:
        ref_hidden: (N, H) of the reference; no gradient flows there.
        hidden: (N, H) of the policy.
        labels: (N,) true tokens.
        head: the frozen head.
        beta: by how much the logit is lowered.
        tile: positions projected at once.
    """

    def measure(piece: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        target = head.logits(ref_hidden[piece].detach())
        chosen = labels[piece, None]
        target = target.scatter_add(-1, chosen, torch.full_like(chosen, -beta, dtype=target.dtype)).softmax(-1)
        return _cross_entropy(head, hidden[piece], target, wants_grad)

    return per_position(hidden, measure, tile)


def complement_cross_entropy(hidden: Tensor, labels: Tensor, head: LMHead, tile: int = TILE) -> Tensor:
    """Cross-entropy to the policy's own distribution with the true token struck out; the target is a constant. Nats."""

    def measure(piece: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        z = head.logits(hidden[piece])
        struck = z.scatter(-1, labels[piece, None], -math.inf).softmax(-1)
        return _cross_entropy(head, hidden[piece], struck, wants_grad, logits=z)

    return per_position(hidden, measure, tile)


def inverted_hinge(hidden: Tensor, labels: Tensor, head: LMHead, tile: int = TILE) -> Tensor:
    """1 + p(y) − max over v ≠ y of p(v), in [0, 2]."""

    def measure(piece: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        z = head.logits(hidden[piece])
        p, chosen = z.softmax(-1), labels[piece, None]
        true = p.gather(-1, chosen)
        rival, at = p.scatter(-1, chosen, -1.0).max(-1, keepdim=True)
        value = (1 + true - rival)[:, 0]
        if not wants_grad:
            return value, None
        # d p(v) / dz = p(v) (onehot(v) − p)
        grad = p * (rival - true)
        grad.scatter_add_(-1, chosen, true)
        grad.scatter_add_(-1, at, -rival)
        return value, head.pull_back(grad, z)

    return per_position(hidden, measure, tile)


def squared_logit_margin(hidden: Tensor, head: LMHead, tile: int = TILE) -> Tensor:
    """(max over v of z(v) − mean over v of z(v))²: 0 where the distribution is uniform."""

    def measure(piece: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        z = head.logits(hidden[piece])
        highest, at = z.max(-1, keepdim=True)
        margin = highest - z.mean(-1, keepdim=True)
        if not wants_grad:
            return margin[:, 0] ** 2, None
        grad = (-2 * margin / z.shape[-1]).expand_as(z).clone()
        grad.scatter_add_(-1, at, 2 * margin)
        return margin[:, 0] ** 2, head.pull_back(grad, z)

    return per_position(hidden, measure, tile)


def jensen_shannon(ref_hidden: Tensor, hidden: Tensor, head: LMHead, tile: int = TILE) -> Tensor:
    """Jensen–Shannon divergence of reference and policy, between 0 and log 2 nats."""

    def measure(piece: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        z = head.logits(hidden[piece])
        logp = z.log_softmax(-1)
        ref_logp = head.logits(ref_hidden[piece].detach()).log_softmax(-1)
        middle = torch.logaddexp(logp, ref_logp) - math.log(2)
        p, excess = logp.exp(), logp - middle
        value = 0.5 * (ref_logp.exp() * (ref_logp - middle)).sum(-1) + 0.5 * (p * excess).sum(-1)
        if not wants_grad:
            return value, None
        # dJS/dp(v) = ½ log(p(v)/m(v)); then through the softmax
        slope = 0.5 * excess
        grad = p * (slope - (p * slope).sum(-1, keepdim=True))
        return value, head.pull_back(grad, z)

    return per_position(hidden, measure, tile)


def _cross_entropy(
    head: LMHead, hidden: Tensor, target: Tensor, wants_grad: bool, logits: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """−Σ target · log p, and its gradient p − target, of one tile."""
    z = head.logits(hidden) if logits is None else logits
    logp = z.log_softmax(-1)
    value = -torch.where(target > 0, target * logp, 0.0).sum(-1)
    return value, (head.pull_back(logp.exp_().sub_(target), z) if wants_grad else None)
