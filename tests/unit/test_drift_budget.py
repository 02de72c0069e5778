"""The drift budget: what it measures, what it penalises, and that it can be taken up again."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align_unlearn.training.drift_budget import DriftBudget


def batch(*rows):
    width = max(len(row) for row in rows)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    kl = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)
    return kl, mask


def test_measures_mean_opening_and_tail():
    budget = DriftBudget(1.0, opening_tokens=2)
    budget.penalty(*batch([4.0, 0.0, 0.0, 0.0], [1.0, 1.0]))
    budget.update()
    assert budget.measured["mean"] == pytest.approx((1.0 + 1.0) / 2)
    assert budget.measured["opening"] == pytest.approx((2.0 + 1.0) / 2)
    assert budget.measured["tail"] == pytest.approx(1.0)


def test_a_changed_opening_is_over_budget_where_the_mean_is_not():
    """A model that begins all answers with a refusal and then goes on as before."""
    budget = DriftBudget(0.1)
    budget.penalty(*batch([3.0, 0.2, 0.0, 0.0] + [0.0] * 60))
    budget.update()
    assert budget.measured["mean"] < budget.budgets["mean"]
    assert budget.measured["opening"] > budget.budgets["opening"]
    assert budget.exceeded


def test_weights_follow_the_drift_and_stay_within_bounds():
    budget = DriftBudget(0.1, coef=2.0, rate=0.5)
    for _ in range(100):
        budget.penalty(*batch([5.0] * 6))
        budget.update()
    assert budget.weights["mean"] == 2.0 * 1e4
    for _ in range(400):
        budget.penalty(*batch([0.0] * 6))
        budget.update()
    assert budget.weights["mean"] == 2.0 * 1e-2


def test_dual_ascent_holds_the_budget_on_a_convex_problem():
    """min −x subject to x²/2 ≤ 0.1 has its optimum at √0.2, whatever the scale of the objective."""
    for scale in (1.0, 20.0):
        budget = DriftBudget(0.1, max_opening=10.0, max_tail=10.0, rate=0.2)
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        for _ in range(3000):
            kl = (x**2 / 2).expand(1, 3)
            loss = -scale * x.sum() + budget.penalty(kl, torch.ones(1, 3, dtype=torch.bool))
            (grad,) = torch.autograd.grad(loss, x)
            with torch.no_grad():
                x -= 2e-3 / scale * grad
            budget.update()
        assert float(x.detach()) == pytest.approx(0.2**0.5, rel=0.05)


@given(st.integers(0, 500))
def test_one_batch_of_rows_equals_batches_of_one(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.rand(length, generator=generator).mul(2).tolist() for length in (3, 7, 5, 2)]
    together, apart = DriftBudget(0.3), DriftBudget(0.3)
    whole = together.penalty(*batch(*rows))
    pieces = sum(apart.penalty(*batch(row)) for row in rows) / len(rows)
    torch.testing.assert_close(whole, pieces)
    together.update()
    apart.update()
    assert together.measured == pytest.approx(apart.measured)
    assert together.weights == pytest.approx(apart.weights)


def test_noise_of_small_batches_does_not_wind_the_weights_up():
    """Rows of a drift that is steady at 0.9 of its budget, four a step, as uneven as rows are."""
    rows = torch.distributions.Exponential(torch.tensor(1 / 0.09, dtype=torch.float64))
    torch.manual_seed(0)
    budget = DriftBudget(0.1, max_opening=0.1)
    assert budget.weights["mean"] == 1.0
    for _ in range(200):
        budget.penalty(rows.sample((4, 1)), torch.ones(4, 1, dtype=torch.bool))
        budget.update()
    assert budget.weights["mean"] < 1.0
    assert budget.weights["opening"] < 1.0


def test_a_window_is_over_when_most_of_its_steps_were():
    budget = DriftBudget(0.1)
    for value in (9.0, 9.0, 9.0, 0.0, 0.0, 0.0):
        budget.penalty(*batch([value]))
        budget._recent.clear()
        budget.update()
        assert budget.exceeded, "the mean of the last four steps stands over it"
    for _ in range(2):
        budget.penalty(*batch([0.0]))
        budget._recent.clear()
        budget.update()
    assert not budget.exceeded
    assert budget.window_exceeded()
    assert not budget.window_exceeded(), "the next window begins empty"


def test_state_goes_through_json_and_back():
    first, second = DriftBudget(0.1), DriftBudget(0.1)
    for _ in range(5):
        first.penalty(*batch([0.3, 0.1], [0.7]))
        first.update()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for budget in (first, second):
        budget.penalty(*batch([0.2, 0.9]))
        budget.update()
    assert first.state_dict() == second.state_dict()
