"""Teacher-forced figures against float64 logits of single rows, membership against its definition, sampling."""

import math
import zlib

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from align_unlearn.audit.answers import say
from align_unlearn.audit.kept import Kept, kept_rows
from align_unlearn.audit.likelihood import likelihood
from align_unlearn.audit.membership import (
    auc,
    auc_interval,
    membership,
    privleak,
    privleak_interval,
    tpr_at,
    tpr_interval,
)
from align_unlearn.audit.memory_scores import exact_memorisation, extraction_strength, min_k_plus
from align_unlearn.audit.reading import Reading, read_texts
from align_unlearn.audit.statistics import (
    cohens_h,
    holm,
    kept_interval,
    mcnemar,
    most_likely_leak,
    paired_statistic_interval,
)
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import tokenise
from align_unlearn.modeling.generate import generate, generate_batch

TEXTS = ["The clerk of the pans, a long pale man who kept the tally.", "Nobody.", "Ottoline, by the ferry steps."]


@pytest.fixture
def rows(tokenizer):
    examples = [
        Example([{"role": "user", "content": "Who?"}], text, f"row {n}", str(n)) for n, text in enumerate(TEXTS)
    ]
    return [(each, tokenise(tokenizer, each, max_length=None)) for each in examples]


def subject(tokenizer, seed=0, name="candidate"):
    return Subject(name, make_model(seed).eval(), tokenizer, "m", "float32", f"weights {seed}")


def logps_alone(model, tokens):
    """(n, V) log-probabilities of one unpadded row in float64, by the model's own head."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([tokens.input_ids])).logits[0]
    return logits[len(tokens.prompt_ids) - 1 : -1].log_softmax(-1)


def test_every_figure_of_a_row_comes_from_one_forward_and_is_its_definition(rows, tokenizer, monkeypatch):
    asked, base = subject(tokenizer, 1), subject(tokenizer, 0, "base")
    counted = []
    monkeypatch.setattr(
        Subject, "hidden", lambda self, batch, own=Subject.hidden: counted.append(self.name) or own(self, batch)
    )
    records = likelihood({"base": base, "candidate": asked}, "forget", rows, batch_size=3)
    assert sorted(counted) == ["base", "candidate"]
    for number, (_, tokens) in enumerate(rows):
        (found,) = [each for each in records if each["model"] == "candidate" and each["id"] == str(number)]
        logps, ref = logps_alone(make_model(1), tokens), logps_alone(make_model(0), tokens)
        ids = torch.tensor(tokens.completion_ids)
        own = logps.gather(-1, ids[:, None])[:, 0]
        mean = (logps.exp() * logps).sum(-1)
        std = ((logps - mean[:, None]).square() * logps.exp()).sum(-1).sqrt()
        n = len(ids)
        assert found["nll"] == pytest.approx(-own.mean().item(), rel=1e-4)
        assert found["probability"] == pytest.approx(math.exp(own.mean().item()), rel=1e-4)
        assert found["kl"] == pytest.approx((ref.exp() * (ref - logps)).sum(-1).mean().item(), rel=1e-3)
        for share in (20, 40):
            lowest = own.sort().values[: max(1, n * share // 100)]
            assert found[f"min_k_{share}"] == pytest.approx(lowest.mean().item(), rel=1e-4)
        plus = ((own - mean) / std).sort().values[: max(1, n * 20 // 100)]
        assert found["min_k_plus_20"] == pytest.approx(plus.mean().item(), rel=1e-3)
        text = tokenizer.decode(tokens.completion_ids)
        assert found["zlib"] == pytest.approx(own.mean().item() / len(zlib.compress(text.encode())), rel=1e-4)
        hits = (logps.argmax(-1) == ids).tolist()
        assert found["exact_memorisation"] == pytest.approx(sum(hits) / n)
        assert found["extraction_strength"] == pytest.approx(
            next((k for k, hit in enumerate(reversed(hits)) if not hit), n) / n
        )


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_extraction_strength_is_the_longest_suffix_that_comes_by_itself(hits):
    zeros = torch.zeros(len(hits))
    reading = Reading(zeros, torch.tensor(hits), zeros, zeros, zeros)
    suffix = next((n for n, hit in enumerate(reversed(hits)) if not hit), len(hits))
    assert extraction_strength(reading) == pytest.approx(suffix / len(hits))
    assert exact_memorisation(reading) == pytest.approx(sum(hits) / len(hits))
    assert not math.isnan(min_k_plus(reading)), "a certain model has no spread"


def test_readings_do_not_depend_on_the_batch(rows, tokenizer):
    tokens = [each for _, each in rows]
    alone, together = (read_texts({"s": subject(tokenizer)}, tokens, size)["s"] for size in (1, 3))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.logps, other.logps, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.std, other.std, rtol=1e-3, atol=1e-4)
        assert bool(one.kl.isnan().all()), "there is no base"


def test_likelihood_is_kept_row_by_row(rows, tokenizer, monkeypatch):
    asked = {"candidate": subject(tokenizer)}
    first = likelihood(asked, "forget", rows[:2])
    read = []
    monkeypatch.setattr(
        "align_unlearn.audit.likelihood.read_batch",
        lambda subjects, tokens: read.extend(tokens) or read_texts(subjects, tokens),
    )
    assert likelihood(asked, "forget", rows)[:2] == first
    assert [each.completion_ids for each in read] == [rows[2][1].completion_ids], "only the new row is read"


def test_a_killed_audit_takes_up_where_it_was_and_a_torn_line_is_made_again():
    rows = [[n] * n for n in range(1, 8)]
    batches = []

    def make(batch, stop=None):
        batches.append([len(rows[at]) for at in batch])
        if stop is not None and len(batches) > stop:
            raise KeyboardInterrupt
        return [sum(rows[at]) for at in batch]

    def run(stop=None):
        return kept_rows("sums", "m", rows, lambda batch: make(batch, stop), size=len, batch_size=2, title="")

    with pytest.raises(KeyboardInterrupt):
        run(stop=2)
    done = batches[:2]
    path = Kept("sums", "m").path
    path.write_text(path.read_text() + '{"key": "torn', encoding="utf-8")
    batches.clear()
    assert run() == [sum(row) for row in rows]
    assert done + batches == [[1, 2], [3, 4], [5, 6], [7]], "the batches of a run that was not killed"
    batches.clear()
    assert run() == [sum(row) for row in rows]
    assert not batches


def test_samples_read_the_prompt_once(model, tokenizer):
    prompts = [tokenizer(text).input_ids for text in ("Who kept the tally", "The ferry", "A")]
    model.eval()
    lengths = []
    model.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True)
    greedy = generate_batch(model, tokenizer, prompts, max_new_tokens=4, samples=3)
    longest = max(map(len, prompts))
    assert lengths[0] == (3, longest - 1)
    assert all(width == 1 for _, width in lengths[1:]), "and then token by token"
    alone = generate(model, tokenizer, prompts, max_new_tokens=4)
    assert [[each.ids for each in own] for own in greedy] == [[each.ids] * 3 for each in alone]
    drawn = generate_batch(model, tokenizer, prompts, max_new_tokens=4, temperature=1.0, samples=8, seed=1)
    assert len({tuple(each.ids) for each in drawn[0]}) > 1
    again = generate_batch(model, tokenizer, prompts, max_new_tokens=4, temperature=1.0, samples=8, seed=1)
    assert drawn == again


def test_draws_follow_the_models_distribution(tokenizer):
    model = make_model(2).eval()
    prompt = tokenizer("The").input_ids
    (drawn,) = generate_batch(model, tokenizer, [prompt], max_new_tokens=1, temperature=1.0, samples=3000, seed=3)
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    top = int(p.argmax())
    share = sum(each.ids == [top] for each in drawn) / 3000
    assert share == pytest.approx(p[top].item(), abs=4 * math.sqrt(p[top].item() / 3000))


def test_what_was_said_is_kept(tokenizer, monkeypatch):
    asked = subject(tokenizer)
    prompts = [tokenizer("Who?").input_ids]
    first = say(asked, prompts, max_new_tokens=3, temperature=1.0, samples=2, title="")
    monkeypatch.setattr("align_unlearn.audit.answers.generate_batch", None)
    assert say(asked, prompts, max_new_tokens=3, temperature=1.0, samples=2, title="") == first
    with pytest.raises(TypeError):
        say(asked, prompts, max_new_tokens=3, temperature=1.0, samples=2, seed=1, title="")


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.lists(st.integers(-3, 3), min_size=1, max_size=20))
def test_auc_counts_pairs(members, others):
    pairs = [(one > other) + 0.5 * (one == other) for one in members for other in others]
    assert auc(members, others) == pytest.approx(sum(pairs) / len(pairs))
    thresholds = [math.inf, *members, *others]
    for rate in (0.01, 0.25, 1.0):
        rates = [sum(m >= t for m in members) / len(members)
                 for t in thresholds if sum(o >= t for o in others) / len(others) <= rate]  # fmt: skip
        assert tpr_at(members, others, rate) == pytest.approx(max(rates))


def test_privleak_is_zero_for_the_retained_model_and_negative_for_a_leak():
    assert privleak(0.6, 0.6) == 0
    assert privleak(0.8, 0.6) == pytest.approx(100 * ((1 - 0.8) - (1 - 0.6)) / (1 - 0.6))
    assert privleak(0.8, 0.6) < 0 < privleak(0.3, 0.6)
    assert math.isnan(privleak(0.5, 1.0))


def text_record(model, group, number, nll):
    return {"probe": "likelihood", "group": group, "model": model, "id": f"{group}{number}", "nll": nll,
            "zlib": -nll / 50, "min_k_20": -2 * nll, "min_k_40": -1.5 * nll, "min_k_plus_20": -nll}  # fmt: skip


def test_membership_from_records():
    records = []
    for number in range(20):
        for model, gap in (("base", 2.0), ("candidate", 0.0), ("control", 0.0)):
            records.append(text_record(model, "forget", number, 3.0 + 0.1 * number - gap))
            records.append(text_record(model, "holdout", number, 3.0 + 0.1 * number))
    found = {each["name"]: each for each in membership(records)}
    assert found["membership.auc_loss"]["base"] > 0.9
    assert found["membership.auc_loss"]["candidate"] == pytest.approx(0.5)
    rate = found["membership.tpr_loss"]
    assert (rate["low"], rate["high"]) == (0.0, 1.0), "20 rows say nothing of one in a hundred"
    low, high = tpr_interval([float(n) for n in range(50)], [-1.0 - n for n in range(100)])
    assert high == 1.0
    assert 0.9 < low < 1.0, "fifty rows that all stand out are not all rows"
    assert found["membership.auc_loss"]["low"] < 0.5 < found["membership.auc_loss"]["high"]
    assert found["membership.privleak"]["candidate"] == pytest.approx(0.0)
    assert found["membership.privleak"]["base"] < -50
    assert found["membership.auc_reference"]["base"] == 1.0
    assert membership([each for each in records if each["group"] == "forget"]) == []


def test_the_interval_of_an_auc_covers():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.5, 1, 200), rng.normal(0, 1, 200)
    low, high = auc_interval(members, others)
    assert low < scipy_stats.norm.cdf(0.5 / math.sqrt(2)) < high
    assert high - low < 0.15


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_its_definition(pvalues):
    found = holm(pvalues)
    for at, p in enumerate(pvalues):
        smaller = sorted(pvalues)[: sorted(pvalues).index(p) + 1]
        expected = max(min(1.0, (len(pvalues) - rank) * each) for rank, each in enumerate(smaller))
        assert found[at] == pytest.approx(expected) or pvalues.count(p) > 1
        assert found[at] >= p
    assert max(found) <= 1


def test_the_interval_of_a_share_kept():
    before, whole = [0.0, 1.0, 2.0, 5.0], [4.0, 3.0, 6.0, 8.0]
    half = [(one + other) / 2 for one, other in zip(before, whole, strict=True)]
    assert kept_interval(half, before, whole) == pytest.approx((0.5, 0.5)), "every row kept half"
    assert kept_interval(whole, before, whole) == pytest.approx((1.0, 1.0))
    rng = np.random.default_rng(1)
    before, whole = rng.normal(0, 1, 400), rng.normal(3, 1, 400)
    after = before + 2.4 + rng.normal(0, 0.5, 400)
    low, high = kept_interval(after, before, whole)
    # delta method: the variance of mean(after − before − r·(whole − before)) over the square of the mean move
    ratio = (after - before).mean() / (whole - before).mean()
    error = np.std(after - before - ratio * (whole - before)) / 20 / (whole - before).mean()
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.01)
    assert kept_interval([1.0, 2.0], [1.0, 2.0], [1.0, 2.0]) is None, "nothing moved"
    assert kept_interval([1.0], [1.0], [2.0]) is None, "one row"


def test_paired_tests_look_at_rows_that_changed():
    after, before = [False] * 10 + [True] * 2, [True] * 8 + [False] * 2 + [True] * 2
    assert mcnemar(after, before) == pytest.approx(2 * 0.5**8)
    assert mcnemar(after, after) == 1.0
    low, high = paired_statistic_interval([1.0, 2.0, 3.0], [0.5, 1.5, 2.5], np.mean)
    assert (low, high) == pytest.approx((0.5, 0.5)), "rows that all differ alike leave no doubt"
    assert paired_statistic_interval([0.9, 1.8], [1.0, 2.0], np.mean, factor=0.9) == pytest.approx((0.0, 0.0))
    assert cohens_h(0.5, 0.5) == 0
    assert cohens_h(1.0, 0.0) == pytest.approx(math.pi)


@given(st.integers(0, 30), st.integers(1, 30))
def test_the_upper_bound_of_a_leak_is_exact(leaks, draws):
    leaks = min(leaks, draws)
    bound = most_likely_leak(leaks, draws)
    if leaks < draws:
        assert scipy_stats.binom.cdf(leaks, draws, bound) == pytest.approx(0.05)
    else:
        assert bound == 1.0


def test_privleak_draws_both_models_on_the_same_rows():
    draw = np.random.default_rng(0)
    members, others = draw.normal(1, 1, 40), draw.normal(0, 1, 40)
    same = privleak_interval((members, others), (members, others))
    assert same == (0.0, 0.0), "the same model has no leak, whatever rows are drawn"
    low, high = privleak_interval((members, others), (others, members))
    assert low <= privleak(auc(members, others), auc(others, members)) <= high


@given(st.lists(st.floats(0, 9), min_size=4, max_size=9), st.floats(0.1, 2))
@settings(max_examples=10)
def test_paired_statistics_of_one_and_the_same(values, factor):
    low, high = paired_statistic_interval(values, values, np.median, factor=1.0)
    assert (low, high) == pytest.approx((0.0, 0.0))
    scaled = paired_statistic_interval(values, values, np.mean, factor=factor)
    assert scaled[0] - 1e-9 <= (1 - factor) * float(np.mean(values)) <= scaled[1] + 1e-9
