"""What decides the weight of a retain term, and the cache that spares the original its forward passes."""

import copy

import pytest
import torch
from datasets import Dataset
from test_training import COMMON, FORGET, RETAIN, adapter_of, unlearn

import align_unlearn.objectives.view as view_module
from align_unlearn.config import BaseModelConfig
from align_unlearn.errors import UserError
from align_unlearn.modeling.load import load_base, lora_config
from align_unlearn.training import ref_cache
from align_unlearn.training.configs import UnlearnConfig
from align_unlearn.training.ref_cache import with_ref_hidden
from align_unlearn.training.retain_term import FixedWeight, HeldByDrift, HeldByEpsilon, make_retain_term
from align_unlearn.training.surgery import GradientSurgery
from align_unlearn.training.unlearn import UnlearnTrainer, tokenised


def config(tmp_path, **settings):
    return UnlearnConfig(output_dir=str(tmp_path / "run"), **{**COMMON, **settings})


def test_which_weight_goes_with_which_setting(tmp_path):
    assert make_retain_term("none", config(tmp_path), {}) is None
    assert isinstance(make_retain_term("kl", config(tmp_path), {}), HeldByDrift)
    assert isinstance(make_retain_term("kl+nll", config(tmp_path), {}), HeldByDrift)
    assert isinstance(make_retain_term("nll", config(tmp_path), {}), FixedWeight)
    assert isinstance(make_retain_term("kl", config(tmp_path, max_drift=0), {}), FixedWeight)
    assert isinstance(make_retain_term("nll", config(tmp_path, max_drift=0.1), {}), HeldByDrift)
    assert isinstance(make_retain_term("nll", config(tmp_path, retain_epsilon=0.5), {}), HeldByEpsilon)
    with pytest.raises(UserError, match="both decide"):
        make_retain_term("nll", config(tmp_path, retain_epsilon=0.5, max_drift=0.1), {})


def test_dual_ascent_on_a_loss_that_is_to_stay_below_epsilon():
    term = HeldByEpsilon(lambda view: view, epsilon=0.5, coef=1.0, step=2.0)
    assert float(term(torch.tensor([1.0, 2.0]))) == pytest.approx(1.0 * (1.5 - 0.5))
    term(torch.tensor([0.0, 1.0]))
    term.update()
    assert term.weight == pytest.approx(1.0 + 2.0 * (1.0 - 0.5))
    other = HeldByEpsilon(lambda view: view, epsilon=0.5, coef=1.0, step=2.0)
    other.load_state_dict(copy.deepcopy(term.state_dict()))
    assert other.metrics() == term.metrics()
    term(torch.tensor([-9.0]))
    term.update()
    assert term.weight == 0.0


class Quadratic:
    """min ½‖x − a‖² subject to ½‖x − b‖² ≤ ε on two coordinates: the solution lies on the segment from b to a."""

    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])


def test_the_weight_settles_at_the_multiplier():
    x = torch.zeros(2, requires_grad=True)
    term = HeldByEpsilon(lambda view: 0.5 * ((view - Quadratic.b) ** 2).sum(-1, keepdim=True), 0.125, 1.0, 0.5)
    for _ in range(800):
        loss = 0.5 * ((x - Quadratic.a) ** 2).sum() + term(x)
        (grad,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            x -= 0.1 * grad
        term.update()
    # ½ x² = 0.125 at x = 0.5, where 0.5 = λ · 0.5
    torch.testing.assert_close(x.detach(), torch.tensor([0.5, 0.0]), atol=1e-3, rtol=0)
    assert term.weight == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize(("retain", "settings"), [("nll", {"max_drift": 0.05}), ("kl+nll", {}), ("js", {})])
def test_a_run_with_each_retain_term(retain, settings, tiny, tokenizer, tmp_path):
    trainer = unlearn(tiny, tokenizer, tmp_path, retain=retain, **settings)
    lines = [line for line in trainer.state.log_history if "retain_loss" in line]
    assert len(lines) == 2
    assert lines[-1]["retain_loss"] > 0
    assert ("drift/mean" in lines[-1]) == (retain != "js")


def test_pdu_needs_epsilon_and_holds_it(tiny, tokenizer, tmp_path):
    model = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=False)

    def build(**settings):
        args = config(tmp_path, **{"max_steps": 40, "learning_rate": 3e-3, "dual_step": 1.0, **settings})
        rows = {"train_dataset": FORGET, "retain_dataset": RETAIN}
        common = {"processing_class": tokenizer, "peft_config": lora_config(model)}
        return UnlearnTrainer(load_base(model), args, objective="pdu", **rows, **common)

    with pytest.raises(UserError, match="retain_epsilon"):
        build()
    trainer = build(retain_epsilon=4.0)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "retain/measured" in line]
    assert lines[0]["retain/measured"] > 4.5
    assert lines[-1]["retain/measured"] < 4.5


def counting(monkeypatch):
    """A list that says of each pass of a model whether it keeps a graph: the policy's do, the original's do not."""
    calls = []
    real = view_module.hidden_states

    def counted(model, *args):
        calls.append(torch.is_grad_enabled())
        return real(model, *args)

    for module in (view_module, ref_cache):
        monkeypatch.setattr(module, "hidden_states", counted)
    return calls


def batches(rows):
    return -(-len(rows) // 8)  # the default batch size


def test_cached_hidden_states_give_the_same_run_without_a_reference_forward(tiny, tokenizer, tmp_path, monkeypatch):
    plain = adapter_of(unlearn(tiny, tokenizer, tmp_path / "a", max_steps=3))
    calls = counting(monkeypatch)
    cached = unlearn(tiny, tokenizer, tmp_path / "b", max_steps=3, cache_ref_hidden=True)
    for name, weight in adapter_of(cached).items():
        torch.testing.assert_close(weight, plain[name], atol=2e-5, rtol=1e-4)
    # beforehand the original reads each forget row and each retain row once; then two policy passes a step
    assert calls.count(False) == batches(FORGET) + batches(RETAIN)
    assert calls.count(True) == 6
    calls.clear()
    again = unlearn(tiny, tokenizer, tmp_path / "b", max_steps=3, cache_ref_hidden=True)
    assert calls.count(False) == 0
    for name, weight in adapter_of(again).items():
        assert torch.equal(weight, adapter_of(cached)[name])


def test_log_probabilities_kept_on_disk_are_those_of_the_view(tiny, tokenizer, tmp_path):
    from conftest import make_model
    from peft import get_peft_model

    model = get_peft_model(make_model(), lora_config(BaseModelConfig(model_name_or_path=str(tiny))))
    rows = tokenised(FORGET, tokenizer, 128)
    kept = ref_cache.with_ref_logps(rows, model, tmp_path, name="forget", batch_size=3)
    for row, logps in zip(rows, kept, strict=True):
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor([row["labels"]])
        alone = view_module.CompletionView(model, ids, torch.ones_like(ids), labels).logps[0]
        torch.testing.assert_close(torch.tensor(logps), alone, atol=1e-5, rtol=1e-5)
    assert ref_cache.with_ref_logps(rows, model, tmp_path, name="forget", batch_size=2) == kept
    with pytest.raises(UserError, match="data or tokenizer"):
        ref_cache.with_ref_logps(tokenised(RETAIN, tokenizer, 128), model, tmp_path, name="forget", batch_size=3)


def test_a_cache_of_other_rows_or_another_model_is_refused(tiny, tokenizer, tmp_path):
    from conftest import make_model
    from peft import get_peft_model

    model = get_peft_model(make_model(), lora_config(BaseModelConfig(model_name_or_path=str(tiny))))
    rows = tokenised(RETAIN, tokenizer, 128)
    first = with_ref_hidden(rows, model, tmp_path / "cache", batch_size=3)
    for at, row in enumerate(rows):
        assert first[at]["ref_hidden"].shape == (sum(label != -100 for label in row["labels"]), 64)
    with pytest.raises(UserError, match="data or tokenizer"):
        with_ref_hidden(Dataset.from_list(list(rows)[:4]), model, tmp_path / "cache", batch_size=3)
    other = get_peft_model(make_model(seed=5), lora_config(BaseModelConfig(model_name_or_path=str(tiny))))
    with pytest.raises(UserError, match="another model"):
        with_ref_hidden(rows, other, tmp_path / "cache", batch_size=3)


def test_surgery_takes_out_what_opposes():
    weight = torch.nn.Parameter(torch.zeros(2))
    idle = torch.nn.Parameter(torch.zeros(1))
    surgery = GradientSurgery([weight, idle])
    surgery.add_retain(weight @ torch.tensor([2.0, 0.0]), 0.5)
    surgery.add_retain(weight @ torch.tensor([2.0, 0.0]), 0.5)
    weight.grad = torch.tensor([-1.0, 3.0])
    surgery.operate()
    # forget (-1, 3) opposes retain (2, 0): only (0, 3) of it is left, and the retain gradient is added
    torch.testing.assert_close(weight.grad, torch.tensor([2.0, 3.0]))
    assert surgery.cosine == pytest.approx(-1 / 10**0.5)
    surgery.operate()
    torch.testing.assert_close(weight.grad, torch.tensor([2.0, 3.0]))
    surgery.add_retain(weight @ torch.tensor([2.0, 0.0]), 1.0)
    weight.grad = torch.tensor([1.0, 3.0])
    surgery.operate()
    torch.testing.assert_close(weight.grad, torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("norm", [1.0, 0.0])
def test_surgery_in_a_run_is_the_same_for_one_by_eight_and_eight_by_one(norm, tiny, tokenizer, tmp_path):
    # by plain descent: Adam divides by the size of the gradient, and makes much of how nearly nothing was rounded
    descent = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": norm}
    common = {"gradient_surgery": True, **descent}
    whole = unlearn(tiny, tokenizer, tmp_path / "a", per_device_train_batch_size=8, **common)
    parts = unlearn(
        tiny, tokenizer, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8, **common
    )
    plain = unlearn(tiny, tokenizer, tmp_path / "c", per_device_train_batch_size=8, **descent)
    cosines = [line["surgery/cosine"] for line in whole.state.log_history if "surgery/cosine" in line]
    assert len(cosines) == 2
    assert max(float(weight.abs().max()) for name, weight in adapter_of(whole).items() if "lora_B" in name) > 1e-2
    for name, weight in adapter_of(whole).items():
        torch.testing.assert_close(weight, adapter_of(parts)[name], atol=2e-6, rtol=1e-5)
    if min(cosines) < 0:
        assert any(not torch.equal(weight, adapter_of(plain)[name]) for name, weight in adapter_of(whole).items())
