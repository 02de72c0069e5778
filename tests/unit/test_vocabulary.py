"""Chunked scalars over the vocabulary against the naive computation: value and gradient, through every kind of head."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lm_head import HEADS, naive_logits, random_head

from align_unlearn.modeling.lm_head import LMHead
from align_unlearn.modeling.vocabulary import (
    complement_cross_entropy,
    demoted_cross_entropy,
    inverted_hinge,
    jensen_shannon,
    squared_logit_margin,
)

LABELS = torch.tensor([1, 5, 9, 36, 0, 5, 17])


def naive_demoted(ref, z, labels):
    target = ref.clone()
    for row, label in enumerate(labels.tolist()):
        target[row, label] -= 4.0
    return -(target.softmax(-1) * z.log_softmax(-1)).sum(-1)


def naive_complement(ref, z, labels):
    rows = []
    for row, label in zip(z, labels.tolist(), strict=True):
        others = torch.tensor([token for token in range(len(row)) if token != label])
        target = row.detach()[others].softmax(-1)
        rows.append(-(target * row.log_softmax(-1)[others]).sum())
    return torch.stack(rows)


def naive_hinge(ref, z, labels):
    rows = []
    for p, label in zip(z.softmax(-1), labels.tolist(), strict=True):
        others = torch.cat([p[:label], p[label + 1 :]])
        rows.append(1 + p[label] - others.max())
    return torch.stack(rows)


def naive_margin(ref, z, labels):
    return (z.max(-1).values - z.mean(-1)) ** 2


def naive_js(ref, z, labels):
    p, q = z.softmax(-1), ref.softmax(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


CASES = {
    "demoted": (
        lambda ref, h, y, head, tile: demoted_cross_entropy(ref, h, y, head, 4.0, tile),
        naive_demoted,
    ),
    "complement": (
        lambda ref, h, y, head, tile: complement_cross_entropy(h, y, head, tile),
        naive_complement,
    ),
    "hinge": (lambda ref, h, y, head, tile: inverted_hinge(h, y, head, tile), naive_hinge),
    "margin": (lambda ref, h, y, head, tile: squared_logit_margin(h, head, tile), naive_margin),
    "js": (lambda ref, h, y, head, tile: jensen_shannon(ref, h, head, tile), naive_js),
}


@pytest.mark.parametrize("kwargs", HEADS)
@pytest.mark.parametrize("tile", [1, 3, 100])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_the_naive_computation(case, tile, kwargs):
    ours, naive = CASES[case]
    head = random_head(**kwargs)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(7, 8, dtype=torch.float64, generator=generator).requires_grad_()
    ref = torch.randn(7, 8, dtype=torch.float64, generator=generator)
    upstream = torch.randn(7, dtype=torch.float64, generator=generator)

    value = ours(ref, hidden, LABELS, head, tile)
    (grad,) = torch.autograd.grad((value * upstream).sum(), hidden)
    expected = naive(naive_logits(head, ref), naive_logits(head, hidden), LABELS)
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), hidden)

    torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(grad, expected_grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_finite_and_close(case):
    ours, _ = CASES[case]
    head = random_head()
    hidden, ref = torch.randn(2, 7, 8, dtype=torch.float64) / 4
    half = LMHead(head.weight.bfloat16(), head.bias.bfloat16())
    rounded = LMHead(half.weight.double(), half.bias.double())
    low = hidden.bfloat16().requires_grad_()
    value = ours(ref.bfloat16(), low, LABELS, half, 4)
    exact = ours(ref.bfloat16().double(), hidden.bfloat16().double(), LABELS, rounded, 4)
    torch.testing.assert_close(value.double(), exact, atol=5e-2, rtol=5e-2)
    value.sum().backward()
    assert torch.isfinite(low.grad).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 30))
def test_bounds(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    head = random_head()
    hidden, ref = torch.randn(2, 7, 8, dtype=torch.float64, generator=generator) * spread
    js = jensen_shannon(ref, hidden, head)
    assert (js >= -1e-12).all()
    assert (js <= math.log(2) + 1e-12).all()
    assert jensen_shannon(hidden, hidden, head).abs().max() < 1e-9
    hinge = inverted_hinge(hidden, LABELS, head)
    assert ((hinge >= 0) & (hinge <= 2)).all()
    assert (squared_logit_margin(hidden, head) >= 0).all()


def test_no_label_gives_nothing():
    head = random_head()
    empty = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    value = inverted_hinge(empty, torch.zeros(0, dtype=torch.long), head)
    assert value.shape == (0,)
    value.sum().backward()
    assert empty.grad.shape == (0, 8)
