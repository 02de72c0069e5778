"""One base, several roles: the original is bitwise the untouched base, and no gradient is lost."""

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model

from align_unlearn.errors import UserError
from align_unlearn.modeling.load import keep_differentiable
from align_unlearn.modeling.roles import original, role

IDS = torch.arange(2, 14)[None]


def quantised(tiny):
    from align_unlearn.config import BaseModelConfig
    from align_unlearn.modeling.load import load_base

    return load_base(BaseModelConfig(model_name_or_path=str(tiny)))


def with_adapter(model, random=True):
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    if random:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("four_bit", [True, False])
def test_original_is_bitwise_the_untouched_base(tiny, four_bit):
    base = quantised(tiny) if four_bit else make_model()
    untouched = logits(base.eval())
    model = with_adapter(base)
    assert not torch.equal(logits(model), untouched)
    with original(model) as speaking:
        assert torch.equal(logits(speaking), untouched)
    assert not torch.equal(logits(model), untouched)


def test_original_leaves_training_mode_and_trainable_weights_as_they_were(model):
    model = with_adapter(model).train()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with original(model) as speaking:
        assert not speaking.training
        assert not torch.is_grad_enabled()
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_original_needs_an_adapter(model):
    with pytest.raises(UserError, match="no adapter"), original(model):
        pass


def test_roles_have_the_gradients_of_separate_models(model):
    """Policy and critic on one base, each backward in its role, against two models of their own."""
    both = with_adapter(model)
    both.add_adapter("critic", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in both.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name))
            parameter.data = torch.randn_like(parameter) * 0.1
            parameter.requires_grad_(True)
    for name in ("default", "critic"):
        with role(both, name) as speaking:
            speaking(IDS).logits.square().mean().backward()
    for name in ("default", "critic"):
        alone = with_adapter(make_model(), random=False)
        for key, parameter in alone.named_parameters():
            if "lora_" in key:
                parameter.data = both.get_parameter(key.replace(".default.", f".{name}.")).data.clone()
        alone(IDS).logits.square().mean().backward()
        for key, parameter in alone.named_parameters():
            if "lora_" in key:
                ours = both.get_parameter(key.replace(".default.", f".{name}.")).grad
                torch.testing.assert_close(ours, parameter.grad, rtol=1e-6, atol=1e-9)


def test_unknown_role(model):
    with pytest.raises(UserError, match="judge"), role(with_adapter(model), "judge"):
        pass


def test_four_bit_gradients_survive_evaluation(tiny, monkeypatch):
    """Sampling before training must not switch 4-bit layers to a kernel without a backward.

    On processors with AVX512-BF16 bitsandbytes repacks weights in evaluation mode for good; it is made to believe that
    this is such a processor wherever the test runs on a CPU that can.
    """
    model = with_adapter(quantised(tiny), random=False)
    assert all(not getattr(each, "support_avx512bf16_for_cpu", False) for each in model.modules())

    def gradient():
        model.zero_grad()
        model.train()
        model(IDS).logits.square().mean().backward()
        return [parameter.grad.clone() for name, parameter in model.named_parameters() if "lora_B" in name]

    before = gradient()
    model.eval()
    logits(model)
    model.generate(IDS, max_new_tokens=2, pad_token_id=1)
    after = gradient()
    assert sum(float(each.abs().sum()) for each in before) > 0
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_keep_differentiable_switches_the_flag_off():
    module = torch.nn.Linear(2, 2)
    module.support_avx512bf16_for_cpu = True
    keep_differentiable(torch.nn.Sequential(module))
    assert module.support_avx512bf16_for_cpu is False
