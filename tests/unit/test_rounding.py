"""Grids are the quantisers' own; compensated rounding keeps what a layer does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from align_unlearn.data.tokens import Tokens
from align_unlearn.errors import UserError
from align_unlearn.export.calibration import Text
from align_unlearn.export.effect import effect
from align_unlearn.export.moments import _drawn, moments
from align_unlearn.modeling import rounding
from align_unlearn.modeling.grid import GRIDS, grid_of
from align_unlearn.modeling.lm_head import LMHead
from align_unlearn.modeling.plain import plain_copy
from align_unlearn.modeling.round_trip import PRECISIONS, linear_layers, requantise, vocabulary_tables
from align_unlearn.modeling.rounding import DAMPING, closest, compensated, descended, feedback, fitted, rescaled
from align_unlearn.modeling.through_quantiser import train_through


def layer(seed=0, rows=24, columns=128):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    # what layers are fed lies mostly in few directions
    few = torch.randn(512, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    return weight, few + 0.1 * torch.randn(512, columns, generator=generator)


def read(found):
    grid, codes = found
    return grid.read(codes)


def step(rank=2, size=0.02, rows=24, columns=128):
    generator = torch.Generator().manual_seed(9)
    a = torch.randn(rank, columns, generator=generator)
    update = torch.randn(rows, rank, generator=generator) @ a
    return update * size * 0.05 / update.std(), a


@pytest.mark.parametrize("precision", GRIDS)
def test_a_grid_rounds_as_the_quantiser_does(precision):
    weight, _ = layer()
    _, rounded = grid_of(weight, precision).nearest(weight)
    theirs = PRECISIONS[precision](weight)
    close = torch.isclose(rounded, theirs, rtol=1e-3, atol=1e-6)
    # the quantiser may choose by a step that is then stored in fp16, so that a value in the middle falls to either side
    assert close.float().mean() > 0.99
    assert (rounded - weight).abs().mean() <= 1.001 * (theirs - weight).abs().mean()


@pytest.mark.parametrize("precision", GRIDS)
def test_what_lies_on_the_grid_stays(precision):
    weight, inputs = layer()
    grid = grid_of(weight, precision)
    _, rounded = grid.nearest(weight)
    codes = compensated(rounded, grid, feedback(inputs.T @ inputs))
    assert torch.equal(rounded, grid.read(codes))
    assert torch.equal(rounded, read(closest(rounded, rounded, grid, inputs.T @ inputs)))


@pytest.mark.parametrize("precision", ["nf4", "q4_0"])
def test_a_small_update_survives_compensated_rounding_and_no_other(precision):
    weight, inputs = layer()
    grid = grid_of(weight, precision)
    _, base = grid.nearest(weight)
    update, a = step()
    _, snapped = grid.nearest(base + update)
    kept = read(closest(base + update, base, grid, inputs.T @ inputs))
    wanted = inputs @ update.T

    def missed(rounded):
        return float(((rounded - base) @ inputs.T - wanted.T).norm() / wanted.norm())

    assert missed(snapped) > 0.9, "nearest rounding loses it"
    assert missed(kept) < 0.6 * missed(snapped)
    assert effect(base, snapped, update, a).share < 0.1
    assert float((kept != base).float().mean()) < 0.1, "few codes change"


@given(st.integers(0, 20), st.sampled_from(sorted(GRIDS)))
@settings(max_examples=20, deadline=None)
def test_compensation_never_costs_output(seed, precision):
    weight, inputs = layer(seed)
    grid = grid_of(weight, precision)
    _, nearest = grid.nearest(weight)
    start = compensated(weight, grid, feedback(inputs.T @ inputs))
    kept = grid.read(start)
    better = grid.read(descended(weight, grid, start, inputs.T @ inputs))
    lost = [((each - weight) @ inputs.T).norm() for each in (better, kept, nearest)]
    assert lost[0] <= 1.02 * lost[1] <= 1.02**2 * lost[2]


@given(st.integers(0, 20))
@settings(max_examples=5, deadline=None)
def test_feedback_is_the_inverse_in_an_order_whose_costs_are_what_later_columns_leave(seed):
    _, inputs = layer(seed, columns=24)
    moments = (inputs.T @ inputs).double()
    with pytest.MonkeyPatch.context() as small:
        small.setattr(rounding, "PIECE", 10)  # several panels
        found = feedback(moments)
    spread = moments + DAMPING * moments.diagonal().mean() * torch.eye(24)
    order = found.order
    assert sorted(order.tolist()) == list(range(24))
    assert torch.equal(found.factor, found.factor.triu())
    torch.testing.assert_close(found.factor.T @ found.factor, torch.linalg.inv(spread[order][:, order]))
    for at in range(24):
        after, left = order[at + 1 :], order[: at + 1]
        told = torch.linalg.solve(spread[after][:, after], spread[after][:, left])
        costs = spread.diagonal()[left] - (spread[left][:, after] * told.T).sum(1)
        assert float(found.costs[order[at]]) == pytest.approx(float(costs[-1]), rel=1e-4)
        assert float(costs[-1]) <= float(costs.min()) * (1 + 1e-9), "the cheapest of those left"


def test_feedback_without_inputs_rounds_to_the_nearest():
    weight, _ = layer()
    grid = grid_of(weight, "q4_0")
    codes = compensated(weight, grid, feedback(torch.zeros(128, 128)))
    assert torch.equal(codes, grid.nearest(weight)[0])


@given(st.integers(0, 20), st.sampled_from(["nf4", "q4_0", "q5_1", "int8"]))
@settings(max_examples=10, deadline=None)
def test_rescaled_scales_are_the_least_squares_of_numpy(seed, precision):
    weight, inputs = layer(seed, rows=4)
    inputs = inputs.double()
    grid = grid_of(weight, precision)
    codes, _ = grid.nearest(weight)
    found = rescaled(weight, grid, codes, inputs.T @ inputs, damping=0)
    blocks = weight.shape[1] // grid.block
    for row in range(4):
        parts = torch.zeros(weight.shape[1], blocks, dtype=torch.float64)
        for at in range(blocks):
            own = slice(at * grid.block, (at + 1) * grid.block)
            parts[own, at] = grid.levels[codes[row, own].long()].double()
        offset = 0 if grid.offset is None else grid.offset[row].repeat_interleave(grid.block).double()
        best, *_ = np.linalg.lstsq((inputs @ parts).numpy(), (inputs @ (weight[row].double() - offset)).numpy())
        np.testing.assert_allclose(found.scale[row].numpy(), best, rtol=2e-2)
    lost = [((each.read(codes) - weight).double() @ inputs.T).norm() for each in (found, grid)]
    assert lost[0] <= 1.001 * lost[1]
    assert torch.equal(found.scale, found.scale.to(grid.stored).float())


@pytest.mark.parametrize("precision", ["nf4", "q4_0", "q5_1"])
def test_codes_and_scales_in_turn_come_closer_than_codes_alone(precision):
    weight, inputs = layer()
    moments, grid = inputs.T @ inputs, grid_of(weight, precision)
    assert not torch.allclose(grid.nearest(weight)[1], weight, rtol=1e-2, atol=1e-6)
    order = feedback(moments)
    once = fitted(weight, grid, order.costs)
    once_codes = descended(weight, once, compensated(weight, once, order), moments)
    lost = [((each - weight) @ inputs.T).norm() for each in (read(closest(weight, weight, grid, moments)),
                                                             once.read(once_codes))]  # fmt: skip
    assert lost[0] < 0.97 * lost[1]


@given(st.integers(0, 20), st.sampled_from(sorted(GRIDS)))
@settings(max_examples=20, deadline=None)
def test_a_fitted_grid_loses_no_more_and_stores_what_its_format_can(seed, precision):
    weight, inputs = layer(seed)
    grid = grid_of(weight, precision)
    weights = inputs.square().sum(0)
    better = fitted(weight, grid, weights)
    lost, before = (((each.nearest(weight)[1] - weight).square() * weights).sum() for each in (better, grid))
    assert lost <= before
    if precision in ("nf4", "q4_0"):
        assert lost < 0.95 * before, "four bits have something to gain"
    for each in (better.scale, better.offset):
        assert each is None or torch.equal(each, each.to(grid.stored).float())


def test_what_matters_is_drawn_by_its_probability(model):
    head, state = LMHead.of(model), torch.randn(1, model.config.hidden_size) * 5
    drawn = _drawn(state.expand(4000, -1), head, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=head.weight.shape[0]) / len(drawn)
    assert (shares - head.logits(state).softmax(-1)[0]).abs().max() < 0.03


def test_moments_of_a_mixture_whose_shared_expert_sees_all_texts_in_one_row():
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        shared_expert_intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    mixture = Qwen2MoeForCausalLM(config).eval()
    found = moments(mixture, [Text(Tokens([1, 2], [3, 4, 5])), Text(Tokens([2], [6]))])
    assert set(found) == {*linear_layers(mixture), "model.embed_tokens", "lm_head"}
    assert all(value.shape[0] == value.shape[1] for value in found.values())
    assert found["model.layers.0.mlp.shared_expert.up_proj"].norm() > 0


def test_effects_by_hand():
    update, a = step()
    base = torch.zeros_like(update)
    whole = effect(base, update, update, a)
    assert (whole.share, whole.cosine) == pytest.approx((1.0, 1.0))
    half = effect(base, update / 2, update, a)
    assert (half.share, half.cosine) == pytest.approx((0.5, 1.0))
    none = effect(base, base, update, a)
    assert (none.share, none.cosine, none.moved) == pytest.approx((0.0, 0.0, 0.0))


def test_widths_that_blocks_do_not_divide_are_left_alone():
    odd = torch.randn(4, 40)
    assert grid_of(odd, "nf4") is None
    assert grid_of(odd, "q4_0") is None
    assert grid_of(odd, "int8") is not None
    with pytest.raises(UserError, match="q4_0"):
        grid_of(odd, "q4_9")


def test_training_through_a_quantiser_sees_the_rounded_sum_and_passes_its_gradient(model):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.arange(3, 30)[None]
    with adapted.disable_adapter(), torch.no_grad():
        before = adapted(ids).logits
    assert train_through(adapted, "q4_0") == 14
    plain = plain_copy(adapted, torch.float32)
    requantise(plain, "q4_0")
    torch.testing.assert_close(adapted(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter(), torch.no_grad():
        assert torch.equal(adapted(ids).logits, before), "the original is not rounded"
    adapted(ids).logits.logsumexp(-1).mean().backward()
    assert all(parameter.grad is not None for name, parameter in adapted.named_parameters() if "lora_" in name)
    with pytest.raises(UserError, match="q4_0"):
        train_through(adapted, "q4_9")


def test_the_gradient_is_that_of_the_unrounded_layer():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
    adapted = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    inputs, out = torch.randn(5, 64), torch.randn(5, 8)
    own = next(module for module in adapted.modules() if hasattr(module, "lora_A"))
    a, b = own.lora_A["default"].weight, own.lora_B["default"].weight
    train_through(adapted, "nf4")
    (adapted(inputs) * out).sum().backward()
    wanted = own.scaling["default"] * (out.T @ inputs)  # of W + s·B A, by hand
    torch.testing.assert_close(b.grad, wanted @ a.T)
    torch.testing.assert_close(a.grad, b.T @ wanted)


def test_moments_count_each_input_by_how_much_the_answers_depend_on_what_is_made_of_it(model, monkeypatch):
    rows = [list(range(3, 20)), list(range(5, 40)), list(range(7, 12))] * 4
    monkeypatch.setattr("align_unlearn.export.moments._drawn", lambda states, head, _: head.logits(states).argmax(-1))
    monkeypatch.setattr("torch.cpu.get_capabilities", dict, raising=False)  # no products in bf16
    found = moments(model, [Text(Tokens(row[:2], row[2:])) for row in rows])
    wanted = dict.fromkeys(linear_layers(model), 0.0)
    seen = {}

    def keep(name):
        def hook(_, given, output):
            output.retain_grad()
            seen[name] = given[0], output

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in linear_layers(model).items()]
    for row in rows:
        logits = model(torch.tensor([row])).logits[0, 1:]  # from the prompt's last token on
        logits.log_softmax(-1).amax(-1).sum().backward()
        for name, (inputs, outputs) in seen.items():
            weights = outputs.grad[0].square().sum(-1)
            wanted[name] = wanted[name] + torch.einsum("t,ti,tj->ij", weights, inputs[0].detach(), inputs[0].detach())
    for hook in hooks:
        hook.remove()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(value.norm()))
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is left as it was"


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlamaConfig(**SMALL), LlamaForCausalLM),
        (Gemma2Config(**SMALL, final_logit_softcapping=2.0), Gemma2ForCausalLM),
        (Gemma3TextConfig(**SMALL), Gemma3ForCausalLM),
    ],
)
def test_moments_of_embedding_and_head_are_those_of_their_own_gradients(config, kind, monkeypatch):
    monkeypatch.setattr("align_unlearn.export.moments._drawn", lambda states, head, _: head.logits(states).argmax(-1))
    monkeypatch.setattr("torch.cpu.get_capabilities", dict, raising=False)  # no products in bf16
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    plain = kind(config).eval()
    row, seen = list(range(3, 20)), {}  # no token twice: a row's gradient is that of one place

    def keep(_, given, output):
        output.retain_grad()
        seen["head"] = given[0][0, 1:].detach(), output

    with plain.lm_head.register_forward_hook(keep):
        plain(torch.tensor([row])).logits[0, 1:].log_softmax(-1).amax(-1).sum().backward()
    states, products = seen["head"]
    rows = plain.model.embed_tokens.weight.grad
    embedding = rows.T @ rows
    head = torch.einsum("t,ti,tj->ij", products.grad[0, 1:].square().sum(-1), states, states)
    texts = [Text(Tokens(row[:2], row[2:]))]
    found = moments(plain, texts)
    torch.testing.assert_close(found["model.embed_tokens"], embedding, rtol=1e-3, atol=1e-5 * float(embedding.norm()))
    torch.testing.assert_close(found["lm_head"], head, rtol=1e-3, atol=1e-5 * float(head.norm()))


def test_of_one_weight_for_both_ends_the_moments_are_the_sum(model, monkeypatch):
    monkeypatch.setattr("align_unlearn.export.moments._drawn", lambda states, head, _: head.logits(states).argmax(-1))
    texts = [Text(Tokens([3, 4], [5, 6, 7])), Text(Tokens([8], [9, 10]))]
    tied = moments(model, texts)
    assert list(vocabulary_tables(model)) == ["model.embed_tokens"]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    apart = moments(model, texts)
    assert apart["lm_head"].norm() > 0
    torch.testing.assert_close(tied["model.embed_tokens"], apart["model.embed_tokens"] + apart["lm_head"])
