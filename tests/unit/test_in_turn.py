"""What calibration texts tell of a layer, and what a layer is told of those before it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from align_unlearn.data.tokens import Tokens
from align_unlearn.export.calibration import Text
from align_unlearn.export.in_turn import Seen, in_turn
from align_unlearn.export.weighing import _drawn, weighed
from align_unlearn.modeling.lm_head import LMHead
from align_unlearn.modeling.round_trip import linear_layers

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
MIXTURE = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 48, "num_experts": 4,
           "num_experts_per_tok": 2}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4)),
    "mixture": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHAPE, **MIXTURE)),
}
TEXTS = [Text(Tokens(row[:2], row[2:])) for row in ([*range(3, 20)], [*range(5, 40)], [*range(7, 12)])] * 4


@pytest.fixture
def exact(monkeypatch):
    """The likeliest token is drawn, and products are not taken in bf16."""
    monkeypatch.setattr("align_unlearn.export.weighing._drawn", lambda states, head, _: head.logits(states).argmax(-1))
    monkeypatch.setattr("torch.cpu.get_capabilities", dict, raising=False)


def make(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def shown(model, batches, changed=lambda name, seen: None):
    found = {}

    def keep(name, seen):
        found[name] = seen
        return changed(name, seen)

    in_turn(model, batches, keep, "asking")
    return found


def watched(model, rows):
    """By linear layer, inputs and outputs in turn of each row, asked alone."""
    found = {name: [] for name in linear_layers(model)}
    hooks = [
        layer.register_forward_hook(lambda _, given, output, name=name: found[name].append((given[0], output)))
        for name, layer in linear_layers(model).items()
    ]
    logits = [model(torch.tensor([row])).logits[0] for row in rows]
    for hook in hooks:
        hook.remove()
    return found, logits


def test_tokens_are_drawn_by_their_probability(model):
    head, state = LMHead.of(model), torch.randn(1, model.config.hidden_size) * 5
    drawn = _drawn(state.expand(4000, -1), head, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=head.weight.shape[0]) / len(drawn)
    assert (shares - head.logits(state).softmax(-1)[0]).abs().max() < 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_each_input_counts_by_how_much_the_answers_depend_on_what_is_made_of_it(family, exact):
    model = make(family)
    found = shown(model, weighed(model, TEXTS))
    seen, logits = watched(model, [text.tokens.input_ids for text in TEXTS])
    for layer in seen.values():
        for _, output in layer:
            output.retain_grad()
    sum(each[1:].log_softmax(-1).amax(-1).sum() for each in logits).backward()  # from the prompt's last token on
    for name, layer in seen.items():
        wanted = 0.0
        for inputs, output in layer:
            rows, slopes = inputs.detach().flatten(0, -2), output.grad
            weights = torch.zeros(len(rows)) if slopes is None else slopes.flatten(0, -2).square().sum(-1)
            wanted = wanted + torch.einsum("t,ti,tj->ij", weights, rows, rows)
        torch.testing.assert_close(found[name].moments, wanted, rtol=1e-3, atol=1e-4 * float(wanted.norm()))
        assert found[name].missing.norm() <= 1e-5 * found[name].moments.norm(), "nothing was changed"
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is left as it was"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_shown_what_it_is_given_once_those_before_it_have_changed(family, exact):
    model = make(family)
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in linear_layers(after).items():
            layer.weight.add_(0.02 * torch.randn_like(layer.weight) * ("layers.2." not in name))
    new = {name: layer.weight for name, layer in linear_layers(after).items()}
    batches = weighed(model, TEXTS)
    found = shown(model, batches, lambda name, seen: new[name])
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), "the model is left as it was"
    name = "model.layers.2.self_attn.q_proj"
    moments = missing = 0.0
    for batch in batches:
        rows = [text.tokens.input_ids for text in batch.texts]
        x, q = (watched(each, rows)[0][name] for each in (before, after))
        weights = batch.weights[name].reshape(len(rows), -1)
        for own, (was, _), (now, _) in zip(weights, x, q, strict=True):
            mass = own[: was.shape[1]].square()
            moments = moments + torch.einsum("t,ti,tj->ij", mass, now[0], now[0]).detach()
            missing = missing + torch.einsum("t,ti,tj->ij", mass, (was - now)[0], now[0]).detach()
    torch.testing.assert_close(found[name].moments, moments, rtol=1e-3, atol=1e-4 * float(moments.norm()))
    torch.testing.assert_close(found[name].missing, missing, rtol=1e-2, atol=1e-3 * float(missing.norm()))
    assert missing.norm() > 1e-3 * moments.norm()


def test_weights_are_put_back_where_somebody_fails():
    model = make("llama")
    before = copy.deepcopy(model.state_dict())

    def failing(name, seen):
        if "layers.1.mlp" in name:
            raise RuntimeError("no")
        return torch.zeros_like(model.get_submodule(name).weight)

    with pytest.raises(RuntimeError, match="no"):
        in_turn(model, weighed(model, TEXTS), failing, "asking")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "model",
    [
        OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48,
                                 num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)),
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    ],
    ids=["opt", "gpt2"],
)  # fmt: skip
def test_layers_outside_of_decoder_layers_are_asked_too(model):
    model.eval()
    found = shown(model, weighed(model, TEXTS))
    assert set(found) == set(linear_layers(model))
    assert all(seen.moments.norm() > 0 for seen in found.values())


def test_decoder_layers_that_do_not_follow_each_other_are_shown_the_model_as_it_is(exact):
    model = make("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, given: (given[0] * 1.1, *given[1:]))
    batches = weighed(model, TEXTS)
    wanted = shown(model, batches)
    found = shown(model, batches, lambda name, seen: torch.zeros_like(model.get_submodule(name).weight))
    assert set(found) == set(linear_layers(model))
    for name, seen in found.items():
        assert torch.equal(seen.moments, wanted[name].moments)
        assert seen.missing.norm() == 0


@given(st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_the_wanted_weight_is_numpys_least_squares(seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(200, 12, generator=generator), torch.randn(5, 12, generator=generator)
    q = x + 0.3 * torch.randn(200, 12, generator=generator) + 0.2 * x.roll(1, 1)
    mass = torch.rand(200, generator=generator)
    seen = Seen(torch.zeros(12, 12), torch.zeros(12, 12))
    for rows in (slice(0, 70), slice(70, 200)):
        seen.add(x[rows], q[rows], mass[rows])
    best, *_ = np.linalg.lstsq((q * mass[:, None]).numpy(), (x @ weight.T * mass[:, None]).numpy())
    np.testing.assert_allclose(seen.wanted(weight, damping=0).numpy(), best.T, rtol=1e-3, atol=1e-4)
    firm = seen.wanted(weight, damping=1e6)
    torch.testing.assert_close(firm, weight, atol=1e-3, rtol=1e-3)
