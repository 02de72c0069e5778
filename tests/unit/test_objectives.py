"""Objectives against closed forms and an independent float64 computation, on completion tokens only."""

import math

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from align_unlearn.errors import UserError
from align_unlearn.objectives import forget, retain
from align_unlearn.objectives.table import FORGET, bind, forget_objective
from align_unlearn.objectives.view import CompletionView


class Given:
    """A view whose log-probabilities are given: (B, T) tensors."""

    def __init__(self, logps, ref_logps=None, mask=None):
        self.logps = logps
        self._ref = ref_logps
        self.mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
        self.lengths = self.mask.sum(-1)

    @property
    def ref_logps(self):
        assert self._ref is not None, "this objective has no business with the reference"
        return self._ref


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(2, 3, 5, generator=generator, dtype=torch.float64) * 3


def test_npo_at_the_start_is_two_over_beta_log_two():
    logps, _ = pair()
    loss = forget.npo(Given(logps, logps), beta=0.1)
    torch.testing.assert_close(loss, torch.full((3,), 2 / 0.1 * math.log(2), dtype=torch.float64))


@given(st.integers(0, 1000), st.sampled_from([0.05, 0.1, 1.0]))
def test_npo_and_its_gradient(seed, beta):
    logps, ref = pair(seed)
    logps = logps.clone().requires_grad_()
    loss = forget.npo(Given(logps, ref), beta=beta)
    ratio = [math.fsum(row) for row in (logps - ref).tolist()]
    expected = [2 / beta * math.log1p(math.exp(beta * each)) for each in ratio]
    torch.testing.assert_close(loss.tolist(), expected, rtol=1e-9, atol=1e-12)
    loss.sum().backward()
    # dL/dlogp = 2·σ(β·ratio): gradient ascent where nothing is forgotten yet, nothing where it is
    slope = [2 / (1 + math.exp(-beta * each)) for each in ratio]
    torch.testing.assert_close(logps.grad, torch.tensor(slope)[:, None].expand(3, 5).double())


def test_npo_tends_to_gradient_ascent_as_beta_goes_to_zero():
    logps, ref = pair()
    logps = logps.clone().requires_grad_()
    forget.npo(Given(logps, ref), beta=1e-6).sum().backward()
    torch.testing.assert_close(logps.grad, torch.ones_like(logps), atol=1e-4, rtol=0)


def test_simnpo_is_normalised_by_length_and_needs_no_reference():
    logps, _ = pair()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    loss = forget.simnpo(Given(logps * mask, mask=mask), beta=2.5, delta=0.3)
    per_token = [-math.fsum(row) / count for row, count in zip((logps * mask).tolist(), (3, 5, 5), strict=True)]
    expected = [2 / 2.5 * math.log1p(math.exp(-2.5 * (each - 0.3))) for each in per_token]
    torch.testing.assert_close(loss.tolist(), expected, rtol=1e-9, atol=1e-12)


def test_ga_is_the_mean_log_probability():
    logps, _ = pair()
    torch.testing.assert_close(forget.ga(Given(logps)), logps.mean(-1))


def adapted(seed=1):
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.double()


def padded_batch(tokenizer):
    """Two rows of different length, padded with the EOS token, each ending in a true EOS that is trained on."""
    from align_unlearn.data.batches import pad_rows

    eos = tokenizer.eos_token_id
    rows = [([5, 6, 7], [20, 21, 22, eos]), ([9, 8], [30, eos])]
    return pad_rows([{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in rows], eos)


def test_view_sees_completion_tokens_and_the_true_eos_once(tokenizer):
    batch = padded_batch(tokenizer)
    model = adapted()
    view = CompletionView(model, **batch)
    assert view.mask.sum(-1).tolist() == [4, 2]
    with torch.no_grad():
        for row, start in ((0, 3), (1, 2)):
            length = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row : row + 1, :length]
            logp = model(ids).logits.log_softmax(-1)[0, start - 1 : length - 1]
            expected = logp.gather(-1, ids[0, start:, None])[:, 0]
            torch.testing.assert_close(view.logps[row][view.mask[row]], expected, rtol=1e-6, atol=1e-9)
    assert (view.logps[~view.mask] == 0).all()


def test_kl_of_view_equals_naive_value_and_gradient(tokenizer):
    batch = padded_batch(tokenizer)
    model = adapted()
    loss = retain.kl(CompletionView(model, **batch)).sum()
    loss.backward()
    ours = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()

    logp = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    with torch.no_grad(), model.disable_adapter():
        ref = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    mask = batch["labels"][:, 1:] != -100
    kl = (ref.exp() * (ref - logp)).sum(-1)[:, :-1] * mask
    naive = (kl.sum(-1) / mask.sum(-1)).sum()
    naive.backward()
    torch.testing.assert_close(loss, naive, rtol=1e-6, atol=1e-9)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-5, atol=1e-9)


FORWARDS = {"npo": (1, 1), "undial": (1, 1), "idk": (2, 2), "altpo": (2, 2), "flat": (2, 0)}
"""(of the policy, of the original) without caches; all others need one of the policy and none of the original."""


@pytest.mark.parametrize("name", FORGET)
def test_objectives_that_need_no_reference_run_none(name, tokenizer, monkeypatch):
    import align_unlearn.objectives.view as module

    calls = {True: 0, False: 0}

    def counting(real):
        def counted(*args):
            calls[torch.is_grad_enabled()] += 1
            return real(*args)

        return counted

    for function in ("hidden_states", "layer_states"):
        monkeypatch.setattr(module, function, counting(getattr(module, function)))
    model, batch = adapted(), padded_batch(tokenizer)
    FORGET[name].loss(CompletionView(model, **batch, chosen=CompletionView(model, **batch)))
    assert (calls[True], calls[False]) == FORWARDS.get(name, (1, 0))


def test_cached_reference_is_used(tokenizer):
    batch = padded_batch(tokenizer)
    cached = torch.zeros_like(batch["labels"][:, 1:], dtype=torch.float64)
    view = CompletionView(adapted(), **batch, ref_logps=cached)
    assert view.ref_logps is cached


def test_unknown_objective_names_the_nearest():
    with pytest.raises(UserError, match="simnpo"):
        forget_objective("simnpoo")


def test_unknown_hyper_parameter_names_the_nearest():
    with pytest.raises(UserError, match="delta"):
        bind(FORGET["simnpo"], "simnpo", {"detla": 1.0})
    with pytest.raises(UserError, match="no hyper-parameters"):
        bind(FORGET["ga"], "ga", {"beta": 1.0})


def test_own_objective_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def loss(view, *, power=1.0):\n    return (view.logps.sum(-1)) * power\n")
    entry = forget_objective(f"{file}:loss")
    logps, _ = pair()
    torch.testing.assert_close(bind(entry, "mine", {"power": 2.0})(Given(logps)), 2 * logps.sum(-1))
    with pytest.raises(UserError, match="loss"):
        forget_objective(f"{file}:los")
    with pytest.raises(UserError, match="no such file"):
        forget_objective(f"{tmp_path}/nothing.py:loss")
