"""What PPO computes from rewards and values: pure functions of (B, T) tensors, column t being the t-th token said."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """The reward of each token: −kl_coef · (log π − log π_ref), and the score of the whole at the last token.

    Args:
        scores: (B,).
        logps: (B, T) log-probabilities when the tokens were sampled.
        ref_logps: (B, T) under the original.
        mask: (B, T), 1 on tokens that were said.

    Returns:
        (B, T) rewards, and (B, T) k1 estimates of the KL, nats; both 0 beyond the end.
    """
    kl = (logps - ref_logps) * mask
    rewards = -kl_coef * kl
    last = (mask.sum(-1) - 1).clamp(min=0).long()
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards * mask, kl


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = Σ_l (γλ)^l δ_{t+l}; after the last token the value is 0.

    Args:
        rewards: (B, T).
        values: (B, T), of the state before each token.
        mask: (B, T), 1 on tokens that were said.

    Returns:
        (B, T) advantages and (B, T) returns, the values' targets; both 0 beyond the end.
    """
    following = torch.zeros_like(values[:, 0])
    later = torch.zeros_like(following)
    columns = []
    for t in reversed(range(values.shape[1])):
        on = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        later = (delta + gamma * lam * later) * on
        following = values[:, t] * on
        columns.append(later)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, (advantages + values) * mask


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over what `mask` keeps; 0 elsewhere. (B, T)"""
    count = mask.sum().clamp(min=1)
    mean = (values * mask).sum() / count
    variance = (((values - mean) ** 2) * mask).sum() / (count - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def value_loss(values: Tensor, before: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """½ max((V − R)², (clip(V, V_before ± c) − R)²), a mean over tokens.

    Args:
        values: (B, T) now.
        before: (B, T) when the rollouts were made.
        returns: (B, T).
        mask: (B, T).
        cliprange: c; 0 leaves the value unclipped.
    """
    loss = (values - returns) ** 2
    if cliprange:
        clipped = torch.clamp(values, before - cliprange, before + cliprange)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * (loss * mask).sum() / mask.sum().clamp(min=1)


def adapted_kl_coef(coef: float, kl: float, target: float, rollouts: int, horizon: int) -> float:
    """coef · (1 + clip(kl / target − 1, ±0.2) · rollouts / horizon) (Ziegler et al. 2019, arXiv:1909.08593, §2.2).

    More rollouts than the horizon move it as far as the horizon does, so that it stays above 0.
    """
    return coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * min(1.0, rollouts / horizon))
