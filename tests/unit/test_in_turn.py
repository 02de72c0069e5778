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
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from align_unlearn.data.tokens import Tokens
from align_unlearn.export.calibration import Text
from align_unlearn.export.in_turn import HELD_OUT, Seen, Shown, in_turn
from align_unlearn.export.rounded import as_rounded, compensated_codes
from align_unlearn.export.weighing import _drawn, weighed
from align_unlearn.modeling.lm_head import LMHead
from align_unlearn.modeling.round_trip import linear_layers

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
MIXTURE = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 48, "num_experts": 4,
           "num_experts_per_tok": 2}  # fmt: skip
SHARED = {"head_dim": 8, "sliding_window": 4, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
          "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
          "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2, "laurel_rank": 4}  # fmt: skip
"""The upper half of the layers attends to keys and values of the lower."""
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4)),
    "gemma3n": lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**{**SHAPE, "num_hidden_layers": 4}, **SHARED)),
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


def whole(seen):
    return seen.told + seen.held


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
        own = whole(found[name])
        torch.testing.assert_close(own.moments, wanted, rtol=1e-3, atol=1e-4 * float(wanted.norm()))
        assert own.missing.norm() <= 1e-5 * own.moments.norm(), "nothing was changed"
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is left as it was"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_shown_what_it_is_given_once_those_before_it_have_changed(family, exact):
    model = make(family)
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in linear_layers(after).items():
            if "layers." in name and "layers.2." not in name:
                layer.weight.add_(0.02 * torch.randn_like(layer.weight))
    new = {name: layer.weight for name, layer in linear_layers(after).items()}
    batches = weighed(model, TEXTS)
    found = shown(model, batches, lambda name, seen: new[name])
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), "the model is left as it was"
    # a router is called twice, which another test is about
    for name in [each for each in found if "layers.2." in each and "router" not in each]:
        moments = missing = 0.0
        for batch in batches:
            rows = [text.tokens.input_ids for text in batch.texts]
            x, q = (watched(each, rows)[0][name] for each in (before, after))
            weights = batch.weights[name].reshape(len(rows), -1)
            for own, (was, _), (now, _) in zip(weights, x, q, strict=True):
                was, now = (each.reshape(-1, each.shape[-1]) for each in (was, now))
                mass = own[: len(was)].square()
                moments = moments + torch.einsum("t,ti,tj->ij", mass, now, now).detach()
                missing = missing + torch.einsum("t,ti,tj->ij", mass, was - now, now).detach()
        own = whole(found[name])
        torch.testing.assert_close(own.moments, moments, rtol=1e-3, atol=1e-4 * float(moments.norm()))
        torch.testing.assert_close(own.missing, missing, rtol=1e-2, atol=1e-3 * float(missing.norm()))
        assert missing.norm() > 1e-3 * moments.norm() or not moments.any()


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
    ],
    ids=["opt"],
)  # fmt: skip
def test_layers_outside_of_decoder_layers_are_asked_too(model):
    model.eval()
    found = shown(model, weighed(model, TEXTS))
    assert set(found) == set(linear_layers(model))
    assert "model.decoder.project_in" in found
    assert all(seen.moments.norm() > 0 for seen in found.values())


def scaled_between(model, factor=1.1):
    """A forward pass that does something of its own between decoder layers."""

    def forward(input_ids, attention_mask=None, use_cache=False):
        states = model.model.embed_tokens(input_ids)
        turned = model.model.rotary_emb(states, torch.arange(input_ids.shape[1])[None])
        for layer in model.model.layers:
            states = factor * layer(states, position_embeddings=turned)
        return BaseModelOutputWithPast(last_hidden_state=model.model.norm(states))

    model.model.forward = forward


@pytest.mark.parametrize("how", ["changed between them", "one is run twice", "no list of that length"])
def test_a_model_that_is_more_than_one_layer_after_the_other_is_shown_as_it_is(how, exact):
    model = make("llama")
    if how == "changed between them":
        scaled_between(model)
    elif how == "one is run twice":
        layer = model.model.layers[0]
        model.model.layers[1].register_forward_hook(
            lambda _, __, output: layer(
                output, position_embeddings=model.model.rotary_emb(output, torch.arange(output.shape[1])[None])
            )
        )
    else:
        model.config.num_hidden_layers = 7
    batches = weighed(model, TEXTS)
    wanted = shown(model, batches)
    found = shown(model, batches, lambda name, seen: torch.zeros_like(model.get_submodule(name).weight))
    assert set(found) == set(linear_layers(model))
    for name, seen in found.items():
        assert whole(seen).moments.norm() > 0
        assert torch.equal(whole(seen).moments, whole(wanted[name]).moments)
        assert not whole(seen).missing.any()


def seen_of(x, q, mass, generator):
    """Every fourth of eight batches is held back."""
    seen = Seen(*(Shown(torch.zeros(x.shape[1], x.shape[1]), torch.zeros(x.shape[1], x.shape[1])) for _ in range(2)))
    for at, rows in enumerate(torch.randperm(len(x), generator=generator).chunk(8)):
        part = seen.held if at % HELD_OUT == HELD_OUT - 1 else seen.told
        part.add(x[rows], q[rows], mass[rows])
    return seen


@given(st.integers(0, 50), st.sampled_from([0.0, 0.01, 0.3]))
@settings(max_examples=20, deadline=None)
def test_the_correction_is_numpys_least_squares(seed, damping):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(200, 12, generator=generator), torch.randn(5, 12, generator=generator)
    q = x + 0.3 * torch.randn(200, 12, generator=generator) + 0.2 * x.roll(1, 1)
    mass = torch.rand(200, generator=generator)
    own = whole(seen_of(x, q, mass, generator))
    rows, asked = (q * mass[:, None]).double(), (x @ weight.T * mass[:, None]).double()
    firm = (damping * (rows.square().sum(0).mean())).sqrt() * torch.eye(12).double()  # draws it to what it is
    best, *_ = np.linalg.lstsq(torch.cat([rows, firm]).numpy(), torch.cat([asked, firm @ weight.T.double()]).numpy())
    np.testing.assert_allclose((weight + own.correction(weight, damping)).numpy(), best.T, rtol=1e-3, atol=1e-4)


@given(st.integers(0, 30), st.sampled_from([40, 64, 200, 2000]))
@settings(max_examples=20, deadline=None)
def test_what_few_rows_ask_for_is_taken_as_far_as_it_holds(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    mix = 0.2 * torch.randn(32, 32, generator=generator) / 32**0.5

    def drawn(count):
        x = torch.randn(count, 32, generator=generator)
        return x, x + x @ mix + 0.5 * torch.randn(count, 32, generator=generator)

    weight = torch.randn(8, 32, generator=generator)
    (x, q), (x_new, q_new) = drawn(rows), drawn(4000)
    seen = seen_of(x, q, torch.ones(rows), generator)
    found, firm = seen.wanted(weight), weight + whole(seen).correction(weight).float()

    def lost(own):
        return float((x_new @ weight.T - q_new @ own.T).square().mean())

    assert lost(found) <= 1.03 * min(lost(weight), lost(firm)), "nearly the better of all and nothing"
    if rows == 2000:
        assert lost(found) < 0.97 * lost(weight)
    if rows == 40:
        assert lost(found) < 0.8 * lost(firm), "taken whole it is an overfit"


def test_without_texts_to_hold_back_nothing_is_corrected():
    torch.manual_seed(0)
    seen = Seen(*(Shown(torch.zeros(8, 8), torch.zeros(8, 8)) for _ in range(2)))
    weight = torch.randn(4, 8)
    assert torch.equal(seen.wanted(weight), weight)
    seen.told.add(torch.randn(50, 8), torch.randn(50, 8), torch.ones(50))
    assert torch.equal(seen.wanted(weight), weight)


def test_a_layer_that_is_called_twice_counts_both_calls(exact):
    model = make("llama")
    layer = model.model.layers[1].mlp
    inner = layer.forward
    layer.forward = lambda states: inner(states) + 0.5 * inner(states.flip(-1))
    batches = weighed(model, TEXTS)
    found = shown(model, batches)
    seen, logits = watched(model, [text.tokens.input_ids for text in TEXTS])
    name = "model.layers.1.mlp.up_proj"
    for _, output in seen[name]:
        output.retain_grad()
    sum(each[1:].log_softmax(-1).amax(-1).sum() for each in logits).backward()
    wanted = 0.0
    for inputs, output in seen[name]:
        mass = output.grad[0].square().sum(-1)
        wanted = wanted + torch.einsum("t,ti,tj->ij", mass, inputs[0].detach(), inputs[0].detach())
    assert len(seen[name]) == 2 * len(TEXTS)
    torch.testing.assert_close(whole(found[name]).moments, wanted, rtol=1e-3, atol=1e-4 * float(wanted.norm()))


def test_rounding_in_turn_loses_less_than_each_layer_by_itself(monkeypatch):
    """On texts that were not calibrated on: what it is for."""
    model = make("llama")
    generator = torch.Generator().manual_seed(0)
    texts = [Text(Tokens(row[:2], row[2:])) for row in torch.randint(3, 64, (256, 24), generator=generator).tolist()]
    fresh = torch.randint(3, 64, (64, 24), generator=generator)
    batches = weighed(model, texts)

    def lost():
        codes = compensated_codes(model, model, "q4_0", batches)
        logps = [each(fresh).logits.log_softmax(-1) for each in (model, as_rounded(copy.deepcopy(model), codes))]
        return float((logps[0].exp() * (logps[0] - logps[1])).sum(-1).mean())

    with torch.no_grad():
        in_turns = lost()
        monkeypatch.setattr(Seen, "wanted", lambda self, weight: weight)
        assert in_turns < lost()
