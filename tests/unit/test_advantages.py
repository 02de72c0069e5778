"""What PPO computes from rewards and values, held to a page of numpy written from the paper."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align_unlearn.training.advantages import (
    adapted_kl_coef,
    generalised_advantages,
    token_rewards,
    value_loss,
    whiten,
)
from align_unlearn.training.dual import DualWeight


def rows(seed, batch=5, width=7):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (batch,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    values, rewards = (torch.randn(batch, width, dtype=torch.float64, generator=generator) for _ in range(2))
    return rewards * mask, values, mask


def numpy_advantages(rewards, values, length, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t, V beyond the end 0: the sum itself, not a recursion."""
    advantages = np.zeros(len(rewards))
    for t in range(length):
        for step in range(t, length):
            following = values[step + 1] if step + 1 < length else 0.0
            delta = rewards[step] + gamma * following - values[step]
            advantages[t] += (gamma * lam) ** (step - t) * delta
    return advantages


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_advantages_are_the_sum_of_the_paper(seed, gamma, lam):
    rewards, values, mask = rows(seed)
    advantages, returns = generalised_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(mask.sum(-1).tolist()):
        expected = numpy_advantages(rewards[row].numpy(), values[row].numpy(), length, gamma, lam)
        np.testing.assert_allclose(advantages[row].numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(returns[row, :length].numpy(), (expected + values[row].numpy())[:length], atol=1e-12)
        assert not returns[row, length:].any()


def test_with_lambda_1_the_return_is_what_was_still_to_come():
    rewards, values, mask = rows(3)
    _, returns = generalised_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    to_come = rewards.flip(-1).cumsum(-1).flip(-1) * mask
    torch.testing.assert_close(returns, to_come)


def test_the_score_is_paid_at_the_last_token_and_the_kl_at_each():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    logps, ref = torch.randn(2, 4), torch.randn(2, 4)
    rewards, kl = token_rewards(torch.tensor([2.0, -1.0]), logps, ref, mask, 0.5)
    expected = -0.5 * (logps - ref) * mask
    expected[0, 2] += 2.0
    expected[1, 0] -= 1.0
    torch.testing.assert_close(rewards, expected)
    torch.testing.assert_close(kl, (logps - ref) * mask)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_what_was_said():
    values, _, mask = rows(5)
    found = whiten(values, mask)
    kept = found[mask.bool()]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-12)
    assert float(kept.std()) == pytest.approx(1, rel=1e-6)
    assert not found[~mask.bool()].any()


def test_the_value_loss_is_the_worse_of_clipped_and_unclipped():
    values = torch.tensor([[1.0, 0.0, 9.0]], requires_grad=True)
    before, returns, mask = torch.tensor([[0.5, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1, 1, 0]])
    loss = value_loss(values, before, returns, mask, 0.2)
    by_hand = 0.5 * (max((1.0 - 2) ** 2, (0.7 - 2) ** 2) + (0.0 - 1) ** 2) / 2
    assert float(loss) == pytest.approx(by_hand)
    (grad,) = torch.autograd.grad(loss, values)
    assert grad[0, 0] == 0  # clipped: the step went far enough
    assert grad[0, 1] == pytest.approx(-0.5)
    assert grad[0, 2] == 0
    assert float(value_loss(values, before, returns, mask, 0.0)) == pytest.approx(0.5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.2, 1.0]))
def test_the_value_loss_is_that_of_numpy(seed, clip):
    returns, values, mask = rows(seed)
    before = rows(seed + 1)[1]
    told = [
        max((v - r) ** 2, (b + np.clip(v - b, -clip, clip) - r) ** 2) if clip else (v - r) ** 2
        for v, b, r, m in zip(*(each.flatten().tolist() for each in (values, before, returns, mask)), strict=True)
        if m
    ]
    assert float(value_loss(values, before, returns, mask, clip)) == pytest.approx(0.5 * np.mean(told), rel=1e-9)


def test_the_kl_coefficient_follows_its_target():
    assert adapted_kl_coef(0.1, 0.3, 0.3, 16, 200) == pytest.approx(0.1)
    assert adapted_kl_coef(0.1, 9.0, 0.3, 100, 200) == pytest.approx(0.1 * 1.1)
    assert adapted_kl_coef(0.1, 0.0, 0.3, 100, 200) == pytest.approx(0.1 * 0.9)


def test_a_dual_weight_rises_over_its_limit_falls_under_it_and_stays_bounded():
    dual = DualWeight(0.1, start=0.0, step=2.0, highest=1.0)
    dual.update(0.3)
    assert dual.value == pytest.approx(0.4)
    dual.update(5.0)
    assert dual.value == 1.0
    for _ in range(20):
        dual.update(0.0)
    assert dual.value == 0.0
    other = DualWeight(0.1, start=0.0, step=2.0)
    other.load_state_dict({"weight": 0.7, "measured": 0.2})
    assert other.state_dict() == {"weight": 0.7, "measured": 0.2}
