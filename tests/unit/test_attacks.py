"""Attacks change copies and nothing else; each is held against its definition."""

import numpy as np
import pytest
import torch
from conftest import make_model
from peft import IA3Config, LoraConfig, get_peft_model

from align_unlearn.audit.attacks import ATTACKS, Bench
from align_unlearn.audit.attacks.bench import copied
from align_unlearn.audit.attacks.linear_probe import flipped, in_pairs, told
from align_unlearn.audit.attacks.prune import prune
from align_unlearn.audit.attacks.refusal_direction import ablate
from align_unlearn.audit.attacks.scale import towards
from align_unlearn.audit.attacks.soft_prompt import soft_logps
from align_unlearn.audit.attacks.tuning import nll, tune
from align_unlearn.audit.diagnosis import ways_tried
from align_unlearn.audit.examination import _tried
from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.worst_case import attack_metrics
from align_unlearn.data.examples import Example, read_examples
from align_unlearn.data.tokens import Tokens, tokenise
from align_unlearn.errors import UserError
from align_unlearn.modeling.plain import plain_copy
from align_unlearn.modeling.round_trip import PRECISIONS, linear_layers, requantise

FACTS = read_examples("builtin:chronicle@forget[:12]")
KEPT = read_examples("builtin:chronicle@retain[:6]")
BENIGN = read_examples("builtin:lookalikes@heldout[:4]")
SHORT = {"relearn": {"steps": [0, 2]}, "relearn_forget": {"steps": [2]}, "relearn_full": {"steps": [1]},
         "benign_tuning": {"steps": [2]}, "soft_prompt": {"steps": [2], "vectors": 2}, "scale": {"factors": [0.0, 1.0]},
         "requantise": {"precisions": ["nf4", "q4_0"]}, "prune": {"shares": [0.3]}, "logit_lens": {},
         "linear_probe": {"depths": [1.0]}, "refusal_direction": {"depths": [0.5]}}  # fmt: skip


@pytest.fixture
def candidate(model, tokenizer):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return Subject("candidate", adapted.eval(), tokenizer, "c", "float32", "candidate")


@pytest.fixture
def bench(candidate, tokenizer):
    from dataclasses import replace

    rows = [[(each, tokenise(tokenizer, each, max_length=None)) for each in rows] for rows in (FACTS, KEPT)]
    return Bench(*rows, BENIGN, replace(candidate, name="base", adapters_off=True), max_new_tokens=2)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_the_model_as_it_was_and_says_its_budget(name, candidate, bench):
    before = {key: value.clone() for key, value in candidate.model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    said = candidate.model(ids).logits.detach()
    records = ATTACKS[name](name, candidate, bench, **SHORT[name])
    after = candidate.model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(candidate.model(ids).logits, said), "no hook is left behind"
    assert records
    assert all(each["budget"] and each["attack"] == name for each in records)
    again = ATTACKS[name](name, candidate, bench, **SHORT[name])
    figures = [[each.get("probability", each.get("score")) for each in run] for run in (records, again)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5), "the same seed gives the same figures"
    (metric, *_) = attack_metrics(records)
    assert metric["name"].startswith(f"attack.{name}.")
    assert len(metric["curve"]) == len({each["setting"] for each in records})


def test_half_of_the_rows_are_taught_and_the_others_measured(candidate, bench):
    records = ATTACKS["relearn"]("relearn", candidate, bench, steps=[1])
    assert {each["id"] for each in records} == {each.id for each in FACTS[1::2]}
    records = ATTACKS["relearn_forget"]("relearn_forget", candidate, bench, steps=[1])
    assert {each["id"] for each in records} == {each.id for each in FACTS}


def test_scaling_by_one_is_the_candidate_and_by_zero_the_base(candidate, bench):
    records = ATTACKS["scale"]("scale", candidate, bench, factors=[0.0, 1.0])
    own = [each["probability"] for each in bench.measure("x", candidate, "s", 0, "b")]
    base = [each["probability"] for each in bench.measure("x", bench.base, "s", 0, "b")]
    at = {factor: [each["probability"] for each in records if each["at"] == factor] for factor in (0.0, 1.0)}
    assert at[1.0] == pytest.approx(own, rel=1e-3)
    assert at[0.0] == pytest.approx(base, rel=1e-3)
    assert own != pytest.approx(base, rel=1e-2)
    one, other = make_model(0), make_model(1)
    middle = make_model(1)
    towards(middle, one, 0.5)
    for name, parameter in middle.named_parameters():
        expected = (dict(one.named_parameters())[name] + dict(other.named_parameters())[name]) / 2
        torch.testing.assert_close(parameter, expected)


@pytest.mark.parametrize(
    ("precision", "steps"), [("nf4", 16), ("fp4", 16), ("int8", 255), ("q8_0", 255), ("q5_1", 32), ("q4_0", 16)]
)
def test_a_round_trip_has_as_many_steps_as_its_bits(precision, steps):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    found = PRECISIONS[precision](weight)
    assert found.shape == weight.shape
    for row in found.split(32, dim=1) if precision.startswith("q") else [found]:
        for block in row:
            assert len(block.unique()) <= steps
    error = (found - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert error < {16: 0.13, 32: 0.06, 255: 0.01}[steps]
    torch.testing.assert_close(PRECISIONS[precision](found), found, rtol=2e-2, atol=2e-2)


def test_every_linear_layer_but_the_head_is_quantised():
    model, before = make_model(3), make_model(3)
    requantise(model, "int8")
    changed = {name for name, parameter in model.named_parameters()
               if not torch.equal(parameter, dict(before.named_parameters())[name])}  # fmt: skip
    assert changed == {f"{name}.weight" for name in linear_layers(before)}
    with pytest.raises(UserError, match="int8"):
        requantise(model, "int9")


def test_pruning_takes_the_smallest():
    model, before = make_model(3), make_model(3)
    prune(model, 0.3)
    for name, layer in linear_layers(model).items():
        own, old = layer.weight.abs(), linear_layers(before)[name].weight.abs()
        assert (own == 0).float().mean() == pytest.approx(0.3, abs=0.01)
        assert old[own == 0].max() <= old[own != 0].min()


def test_tuning_learns_and_comes_by_when_asked(bench):
    rows = [tokens for _, tokens in bench.forget[:4]]
    model = make_model(0)
    losses = []
    for step in tune(model, rows, steps=[0, 3, 12], learning_rate=1e-2, batch_size=4):
        with torch.no_grad():
            losses.append((step, nll(model, rows).item()))
    assert [step for step, _ in losses] == [0, 3, 12]
    assert losses[2][1] < losses[1][1] < losses[0][1]


def test_a_soft_prompt_of_no_vectors_is_the_model_itself(candidate, bench):
    model = copied(candidate).model
    rows = [tokens for _, tokens in bench.forget[:3]]
    with torch.no_grad():
        bare = soft_logps(model, torch.empty(0, 64), rows)
        assert -bare.mean().item() == pytest.approx(nll(model, rows).item(), rel=1e-4)
        put = soft_logps(model, torch.randn(2, 64), rows)
    assert put.shape == bare.shape
    assert not torch.allclose(put, bare)


def test_an_ablated_direction_is_written_by_no_layer(candidate):
    model = copied(candidate).model
    direction = torch.randn(64)
    ablate(model, direction)
    with torch.no_grad():
        states = model.base_model(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    for state in states[:-1]:
        assert (state @ direction).abs().max() < 1e-4 * direction.norm() * state.norm()


def test_the_lens_of_the_last_layer_is_the_model(candidate, bench):
    records = ATTACKS["logit_lens"]("logit_lens", candidate, bench, every=1)
    last = [each["probability"] for each in records if each["at"] == 2]
    assert last == pytest.approx([each["probability"] for each in bench.measure("x", candidate, "s", 0, "b")], rel=1e-3)
    assert len(records) == 2 * len(FACTS)


def test_a_linear_probe_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = np.array([1] * 40 + [0] * 40)
    groups = np.array([at // 2 for at in range(40)] * 2)
    noise = rng.normal(size=(80, 16)).astype(np.float32)
    there = noise + 3 * labels[:, None] * np.eye(16, dtype=np.float32)[0]
    assert (told(there, labels, groups) == labels).mean() > 0.85
    assert 0.3 < (told(noise, labels, groups) == labels).mean() < 0.7


def test_what_an_attack_was_given_is_shown_and_is_no_worst_case(candidate, bench):
    records = ATTACKS["scale"]("scale", candidate, bench, factors=[0.0, 0.5])
    records += ATTACKS["relearn_forget"]("relearn_forget", candidate, bench, steps=[1])
    by_name = {each["name"]: each for each in attack_metrics(records)}
    scale, relearn = by_name["attack.scale.leak"], by_name["attack.relearn_forget.leak"]
    assert [point["given"] for point in scale["curve"]] == [True, False]
    assert "α 0.5" in scale["budget"]
    assert (scale["given"], relearn["given"]) == (False, True)
    assert [each["name"] for each in ways_tried(by_name)] == ["attack.scale.leak"]


def test_adapters_that_a_copy_would_leave_out_are_refused():
    with pytest.raises(UserError, match="IA3"):
        plain_copy(get_peft_model(make_model(0), IA3Config(task_type="CAUSAL_LM")), torch.float32)
    embedded = get_peft_model(make_model(0), LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(UserError, match="embeddings"):
        plain_copy(embedded, torch.float32)


def test_an_attack_that_breaks_is_reported_and_tried_again(candidate, bench, monkeypatch):
    def breaks(name, subject, bench, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(ATTACKS, "prune", breaks)
    (record,) = _tried("prune", candidate, bench, {})
    assert record["failed"] == "out of memory"


def test_likely_pairs_and_flips_of_the_linear_probe():
    def row(question):
        return Example([{"role": "user", "content": question}], "x", "", question), Tokens([1], [2])

    rows = [row("where was she born"), row("what does he paint"), row("where was he born"), row("what does she paint")]
    assert [each.question for each, _ in in_pairs(rows)] == [
        "where was she born", "where was he born", "what does he paint", "what does she paint"
    ]  # fmt: skip
    labels, groups = np.array([1, 1, 1, 1, 0, 0, 0, 0]), np.array([0, 0, 1, 1, 0, 0, 1, 1])
    for each in flipped(labels, groups, np.random.default_rng(0)):
        assert sum((each != labels).reshape(2, 4)[0]) == 2, "one of two groups, whole"
