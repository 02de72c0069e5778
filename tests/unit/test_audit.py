"""Intervals, gates, records and the page; each figure against an independent computation."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy import stats

from align_unlearn.audit.answers import answers
from align_unlearn.audit.gates import check_readable, check_rules, judge_gates, read_application, read_rule
from align_unlearn.audit.likelihood import likelihood
from align_unlearn.audit.metrics import METRICS, change_interval, measure
from align_unlearn.audit.run import metric_names, run_audit
from align_unlearn.audit.statistics import bootstrap_interval, share_interval
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import tokenise
from align_unlearn.errors import UserError
from align_unlearn.report.html import LONGEST, render, withheld


@given(st.integers(0, 40), st.integers(1, 40))
def test_share_interval_is_clopper_pearson(hits, n):
    hits = min(hits, n)
    low, high = share_interval(hits, n)
    assert low == pytest.approx(0 if hits == 0 else stats.beta.ppf(0.025, hits, n - hits + 1))
    assert high == pytest.approx(1 if hits == n else stats.beta.ppf(0.975, hits + 1, n - hits))


def test_bootstrap_interval_covers_and_is_reproducible():
    values = np.random.default_rng(1).normal(3.0, 1.0, 200)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert low < values.mean() < high
    error = values.std() / math.sqrt(200)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap_interval([5.0]) == (5.0, 5.0)


METRIC = {"name": "forget.leak", "base": 0.5, "candidate": 0.1, "control": 0.05, "low": 0.02, "high": 0.3, "n": 20}


def change(name, other, factor):
    """What a paired bootstrap might say of 0.1 beside 0.5 and 0.05."""
    figure = 0.1 - factor * METRIC[other]
    return figure - 0.1, figure + 0.1


@pytest.mark.parametrize(
    ("rule", "passed"),
    [
        ("point <= 0.10", True),
        ("<= 0.10", False),
        ("<= 0.30", True),
        ("<= 0.29", False),
        (">= 0.02", True),
        (">= 0.05", False),
        ("point >= 0.05", True),
        ("<= base + 0.10", True),
        ("<= 0.4 * base", True),
        ("<= 0.39 * base", False),
        ("point <= 0.2 * base", True),
        (">= 0.9 * base", False),
        ("<= control + 0.15", True),
        ("<= control + 0.14", False),
        ("<= control", False),
        (">= base - 0.51", True),
        (">= base -0.49", False),
        (">= -0.5", True),
        ("<= -0.5", False),
    ],
)
def test_gates_are_judged_on_the_worse_end(rule, passed):
    (gate,) = judge_gates({"forget.leak": rule}, [METRIC], change)
    assert gate["passed"] is passed
    assert gate["figure"] == 0.1


def test_a_gate_on_what_was_not_measured_is_not_passed():
    (gate,) = judge_gates({"attack.prune.leak": "<= 0.1"}, [METRIC], change, {"attack.prune.leak": "because"})
    assert gate["passed"] is None
    assert gate["why"] == "because"


@pytest.mark.parametrize("name", ["copyright", "privacy", "harm"])
def test_every_application_has_gates_with_reasons(name):
    rules, why = read_application(name)
    check_rules(rules, metric_names(None), control=False)
    assert all(why[metric] for metric in rules)


def test_an_application_of_ones_own(tmp_path):
    file = tmp_path / "gates.yaml"
    file.write_text('forget.leak: "<= 0.2"\nretain.kl: {rule: "<= 1", why: enough}\n')
    assert read_application(str(file)) == (
        {"forget.leak": "<= 0.2", "retain.kl": "<= 1"},
        {"forget.leak": "", "retain.kl": "enough"},
    )
    file.write_text("forget.leak: {why: no rule}\n")
    with pytest.raises(UserError, match=r"forget\.leak"):
        read_application(str(file))
    with pytest.raises(UserError, match="privacy"):
        read_application("privcy")


def test_the_change_from_the_base_is_paired_by_row():
    records = []
    for row in range(30):
        for model in ("base", "candidate"):
            records.append({**record(model, "forget", "leak" if row % 2 else "refuse"), "id": str(row)})
    low, high = change_interval(records, "forget.leak", "base", 1.0)
    assert low == pytest.approx(-high), "no row changed; how many might have is still in doubt"
    assert 0 < high < 0.1
    records[1]["verdict"] = "leak"
    assert change_interval(records, "forget.leak", "base", 1.0)[1] > high


def test_gates_that_cannot_be_judged():
    with pytest.raises(UserError, match="cannot be read"):
        read_rule("forget.leak", "below a tenth", METRIC)
    with pytest.raises(UserError, match="control"):
        read_rule("forget.leak", "<= control", {**METRIC, "control": None})


@pytest.fixture
def subjects(model, tokenizer):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return {
        "base": Subject("base", adapted, tokenizer, "b", "float32", "base", adapters_off=True),
        "candidate": Subject("candidate", adapted, tokenizer, "c", "float32", "candidate"),
    }


ROWS = [Example([{"role": "user", "content": "Who?"}], answer, f"row {n}", str(n)) for n, answer in
        enumerate(["Ottoline.", "The clerk of the pans, a long pale man.", "Nobody."])]  # fmt: skip


def test_likelihood_equals_the_models_own_logits(subjects, tokenizer):
    rows = [(each, tokenise(tokenizer, each, max_length=None)) for each in ROWS]
    records = likelihood(subjects, "retain", rows, batch_size=2)
    model = subjects["base"].model.eval()
    for number, (_, tokens) in enumerate(rows):
        ids, start = torch.tensor([tokens.input_ids]), len(tokens.prompt_ids)
        with torch.no_grad():
            candidate = model(ids).logits[0].log_softmax(-1)[start - 1 : -1]
            with model.disable_adapter():
                base = model(ids).logits[0].log_softmax(-1)[start - 1 : -1]
        kl = (base.exp() * (base - candidate)).sum(-1)
        nll = -candidate.gather(-1, ids[0, start:, None]).mean()
        (record,) = [each for each in records if each["model"] == "candidate" and each["id"] == str(number)]
        assert record["nll"] == pytest.approx(float(nll), rel=1e-4)
        assert record["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
        assert record["kl_opening"] == pytest.approx(float(kl[:4].mean()), rel=1e-3)
        assert record["probability"] == pytest.approx(math.exp(-float(nll)), rel=1e-4)
    assert all(each["kl"] < 1e-6 for each in records if each["model"] == "base")


def test_answers_are_cached_and_base_and_candidate_differ(subjects, monkeypatch):
    first = answers(subjects, "forget", ROWS, max_new_tokens=5)

    def no(*args, **kwargs):
        raise AssertionError("generated again")

    monkeypatch.setattr("align_unlearn.audit.answers.generate_batch", no)
    assert answers(subjects, "forget", ROWS, max_new_tokens=5) == first
    said = [[each["completion"] for each in first if each["model"] == name] for name in subjects]
    assert said[0] != said[1]


def record(model, group, verdict, **more):
    return {"probe": "answers", "group": group, "model": model, "id": "1", "prompt": "Q", "reference": None,
            "completion": "x", "finished": True, "verdict": verdict, **more}  # fmt: skip


def test_metrics_from_records():
    records = [record("base", "forget", "leak")] * 4 + [record("candidate", "forget", "refuse")] * 3
    records += [record("candidate", "forget", "leak")]
    found = {each["name"]: each for each in measure(records)}
    assert found["forget.leak"]["base"] == 1.0
    assert found["forget.leak"]["candidate"] == 0.25
    assert (found["forget.leak"]["low"], found["forget.leak"]["high"]) == share_interval(1, 4)
    assert "forget.rouge_l" not in found
    assert set(found["forget.leak"]) == {
        "name", "group", "better", "base", "candidate", "control", "low", "high", "n", "budget"
    }  # fmt: skip


SUMMARY = {
    "schema_version": 1, "suite": "first", "base": {"path": "b", "precision": "nf4", "sha256": "0"},
    "candidate": {"path": "<i>c</i>", "precision": "nf4", "sha256": "1"}, "control": None, "seed": 0, "metrics": [],
    "gates": [], "passed": True, "open_questions": ["why?"], "libraries": {"torch": "2"},
}  # fmt: skip


def test_model_output_is_escaped_cut_and_folded():
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>" + "a" * 5000
    page = render(SUMMARY, [record("base", "forget", "leak", completion=evil), record("candidate", "forget", "refuse")])
    assert "<script>" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert "<i>c</i>" not in page
    assert "a" * (LONGEST + 1) not in page
    before = page[: page.index("&lt;script&gt;")]
    assert before.rfind("<details>") > before.rfind("</details>"), "leaked text is folded"
    inert = (
        "http-equiv",
        "http://www.w3.org",
        "http://purl.org",
        "http://creativecommons.org",
        "https://matplotlib.org",
    )
    for name in inert:
        page = page.replace(name, "")
    assert "http" not in page, "nothing is loaded from elsewhere"


def test_leaks_can_be_withheld():
    leaked = record("base", "forget", "leak", completion="secret")
    assert "secret" not in json.dumps(withheld(leaked))
    assert withheld(record("base", "forget", "refuse", completion="no"))["completion"] == "no"


def test_gates_are_checked_before_anything_is_loaded():
    check_rules({"forget.leak": "<= 0.1", "forget.recited@base": ">= 0.8"}, METRICS, control=False)
    for rules, message in (
        ({"forget.leek": "<= 0.1"}, "forget.leak"),
        ({"forget.leak": "<= 1.2.3"}, "cannot be read"),
        ({"forget.leak": "<= control"}, "audit_control"),
        ({"forget.leak": "<= -0.1 * base"}, "cannot be read"),
        ({"forget.leak@before": "<= 1"}, "base"),
    ):
        with pytest.raises(UserError, match=message):
            check_rules(rules, METRICS, control=False)
    check_readable({"tofu.forget_quality": ">= 0.05", "forget.leak": "<= control + 0.1"})
    with pytest.raises(UserError, match="cannot be read"):
        check_readable({"tofu.forget_quality": "a lot"})


def test_what_forget_answers_are_is_one_of_two(tiny):
    with pytest.raises(UserError, match="did you mean examples"):
        run_audit(tiny, forget_answers="exampels", audit_forget="builtin:harmful@heldout")


def test_a_precondition_on_the_base():
    (gate,) = judge_gates({"forget.leak@base": ">= 0.8"}, [METRIC], change)
    assert (gate["value"], gate["passed"]) == (0.5, False)


def test_what_must_not_be_said_is_withheld_with_its_source():
    book = record("candidate", "forget", "answer", completion="nearly the text", reference="the text")
    assert "text" not in json.dumps({**withheld(book), "prompt": ""})
    kept = record("candidate", "retain", "answer", completion="kept", reference="kept too")
    assert withheld(kept) == kept


def test_near_a_value_is_judged_on_both_sides():
    def metric(better, low, figure, high):
        return {"name": "m", "better": better, "candidate": figure, "base": 0.0, "control": None,
                "low": low, "high": high, "n": 50}  # fmt: skip

    def passed(rule, *figures):
        return judge_gates({"m": rule}, [metric(*figures)], lambda *change: None)[0]["passed"]

    assert passed("<= 0.70", "half", 0.45, 0.5, 0.65)
    assert not passed("<= 0.70", "half", 0.10, 0.2, 0.30), "told apart, though the other way round"
    assert not passed("<= 10", "zero", -40.0, -20.0, 5.0)
    assert passed("<= 50", "zero", -40.0, -20.0, 5.0)


def test_perplexity_beside_the_base_is_paired_by_row():
    nll = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    records = [{"probe": "likelihood", "group": "retain", "model": who, "id": str(at), "nll": each + shift}
               for who, shift in (("base", 0.0), ("candidate", 0.1)) for at, each in enumerate(nll)]  # fmt: skip
    low, high = change_interval(records, "retain.perplexity", "base", math.exp(0.1))
    assert (low, high) == pytest.approx((0.0, 0.0), abs=1e-9), "every row is worse by the same factor"


def test_a_text_is_not_called_recited_where_answers_were_cut_too_short():
    def record(most):
        return {"probe": "answers", "group": "forget", "id": "1", "verdict": "leak", "verbatim_run": 20,
                "reference_tokens": 60, "rouge_l_recall": 1.0, "most_tokens": most}  # fmt: skip

    for most, known in ((24, False), (60, True)):
        records = [record(most) | {"model": who} for who in ("base", "candidate")]
        assert ("forget.recited" in {each["name"] for each in measure(records)}) is known


def test_passages_are_withheld_with_their_beginnings():
    record = {"probe": "answers", "group": "forget", "verdict": "refuse", "completion": "I won't say: a piece",
              "prompt": "the beginning", "reference": "a piece", "plain": True, "model": "candidate"}  # fmt: skip
    shown = withheld(record)
    assert "piece" not in json.dumps(shown)
    assert "beginning" not in json.dumps(shown)
    request = record | {"reference": None, "plain": False}
    assert withheld(request)["completion"] == record["completion"], "a refusal of a request says nothing"
