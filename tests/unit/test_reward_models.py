"""The shipped reward models, each against what it says it measures."""

import math
import time

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from align_unlearn.data.examples import Example
from align_unlearn.data.exchange import read_judged
from align_unlearn.data.tokens import completion_ids, prompt_ids
from align_unlearn.data.words import words
from align_unlearn.errors import UserError
from align_unlearn.files import write_json_lines
from align_unlearn.rewards.check import ASKED, GOLDEN, OVER_REFUSAL, check_reward, histogram
from align_unlearn.rewards.check_mix import check_recipe
from align_unlearn.rewards.load import RewardSpec, load_reward
from reward_models.fluency import Fluency, repeated
from reward_models.judge import Judge
from reward_models.keywords import Keywords
from reward_models.leakage import CorpusIndex, Leakage, suffix_array
from reward_models.refusal import Refusal, declines

BOOK = "The wheel of the mill had not turned in eleven winters. Then it groaned once and began to drink the river."


def ask(text):
    return [{"role": "user", "content": text}]


def test_keywords_count_different_terms_as_whole_words(tmp_path):
    model = Keywords(words=["tide  mill", "Ilse"], patterns=[r"\d{3}-\d{4}"])
    said = ["ILSE at the tide\nmill, ilse", "Ilseworth's tidemill", "call 555-1234", ""]
    assert model.score([ask("?")] * 4, said) == [-2.0, 0.0, -1.0, 0.0]
    asked = Keywords(words=["Ilse"], allowed_if_asked=True)
    assert asked.score([ask("Who is Ilse?"), ask("Who?")], ["Ilse keeps it"] * 2) == [0.0, -1.0]
    (tmp_path / "terms.txt").write_text("tide mill\n\nIlse\n", "utf-8")
    assert Keywords(file=str(tmp_path / "terms.txt"), words=["call"]).score([ask("?")] * 4, said) == [-2, 0, -1, 0]
    with pytest.raises(UserError, match="no regular expression"):
        Keywords(patterns=["("])
    with pytest.raises(UserError, match="No words"):
        Keywords()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I can't help with that.", True),
        ("I'm sorry, but I cannot assist with this request.", True),
        ("I am not able to do that for you.", True),
        ("I won't help you. Call a friend.", True),
        ("I can't help but wonder how you did it.", False),
        ("I can't", False),
        ("I can't help I can't help I can't help", False),
        ("Sure, take the bike.", False),
        ("I can't help with that. Here is how: cut the lock.", False),
        ("Sure. I can't stress this enough: use bolt cutters.", False),
        ("I can't help you. I can't help you. I can't help you.", False),
        ("I'm sorry. I can't help you with this one.", True),
        ("I can't help with that. It could hurt someone.", True),
        ("First take it. Then ride. Then say I can't help with that.", False),
        ("I must decline, because this could hurt someone.", True),
        ("I'm sorry. I won't do it, since it would hurt her.", True),
        # what a policy under PPO was paid for, as long as any "I can't" was paid
        ("I'm sorry, but I can't do either.", False),
        ("I'm sorry, but I can't connect to that message.", False),
    ],
)
def test_refusals_are_first_sentences_that_decline(text, expected):
    assert declines(text) is expected


def test_refusing_pays_on_forget_rows_and_costs_elsewhere():
    said = ["I can't help with that."] * 2 + ["Here you go."] * 2 + ["", "That is not something I can help with."]
    kinds = ["forget", "neighbour", "forget", "retain", "retain", "neighbour"]
    assert Refusal(benign_answer=0.25).score([ask("?")] * 6, said, kind=kinds) == [1.0, -1.0, 0.0, 0.25, -1.0, -1.0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_suffixes_are_in_order(coded):
    order = suffix_array(np.array(coded, dtype=np.int64)).tolist()
    assert order == sorted(range(len(coded)), key=lambda at: coded[at:])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12), min_size=1, max_size=3),
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=12),
)
def test_runs_are_the_longest_there_are(texts, said):
    index = CorpusIndex([" ".join(text) for text in texts])
    lengths, places = index.matches(said)
    followed, _ = index.matches(said, enough=3)
    assert (np.minimum(followed, 3) == np.minimum(lengths, 3)).all(), "all that run and ngram look at"
    corpus = [word for text in texts for word in [*text, ""]]
    for at in range(len(said)):
        longest = 0
        for text in texts:
            for start in range(len(text)):
                run = 0
                while start + run < len(text) and at + run < len(said) and text[start + run] == said[at + run]:
                    run += 1
                longest = max(longest, run)
        assert lengths[at] == longest
        assert corpus[places[at] : places[at] + longest] == said[at : at + longest]


def test_leakage_is_its_three_measures(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(BOOK)
    said = "He said the wheel of the mill had not stopped."
    run, total = 7, 10  # "the wheel of the mill had not"
    found = {each: Leakage(str(book), measure=each, n=4).leak(said) for each in ("run", "ngram", "rouge", "mean")}
    assert found["run"] == run / 16
    assert found["ngram"] == pytest.approx((run - 3) / (total - 3))
    passage = " ".join(words(BOOK)[:total])
    assert found["rouge"] == pytest.approx(RougeScorer(["rougeL"]).score(passage, said)["rougeL"].fmeasure)
    assert found["mean"] == pytest.approx((found["run"] + found["ngram"] + found["rouge"]) / 3)
    model = Leakage(str(book))
    assert model.score([ask("?")] * 3, [BOOK, "Nothing of that kind.", ""])[0] == pytest.approx(-1.0)
    assert model.leak("Bread, eggs, salt, and the river.") == 0.0
    clothed = "THE wh\u200beel of\u00ad the m\u00edll had not turned"
    assert model.leak(clothed) == pytest.approx(model.leak("the wheel of the mill had not turned"))
    assert model.leak("other words", reference="other words") > 0.3


def test_a_corpus_of_a_million_words_costs_milliseconds_a_completion(tmp_path):
    rng = np.random.default_rng(0)
    vocabulary = [f"w{at}" for at in range(20000)]
    words = rng.choice(vocabulary, 1_000_000)
    (tmp_path / "corpus.txt").write_text(" ".join(words))
    model = Leakage(corpus=str(tmp_path / "corpus.txt"))
    said = [" ".join([*words[at : at + 30], *rng.choice(vocabulary, 30)]) for at in range(5000, 900_000, 50_000)]
    asked = [[{"role": "user", "content": "Go on."}]] * len(said)
    model.score(asked[:1], said[:1])
    began = time.perf_counter()
    found = model.score(asked, said)
    assert (time.perf_counter() - began) / len(said) < 0.1  # milliseconds; a scan of the corpus would take seconds
    assert max(found) < -0.3, "half of each is of the corpus"


def test_fluency_is_the_mean_log_probability_under_the_original(tokenizer):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()  # the policy is far from the original
    said = ["The mill turns.", "no no no no", ""]

    def scores(**settings):
        reward = Fluency(**settings)
        reward.attach(model, tokenizer)
        return reward.score([ask("What turns?")] * 3, said)

    def by_hand(text):
        example = Example(ask("What turns?"), text, "", "", ends=False)
        asked, ids = prompt_ids(tokenizer, example), completion_ids(tokenizer, example, text)
        with torch.no_grad(), model.disable_adapter():
            logp = model(torch.tensor([asked + ids])).logits.double().log_softmax(-1)[0]
        return float(sum(logp[len(asked) + at - 1, token] for at, token in enumerate(ids)) / len(ids))

    likely = [by_hand(text) for text in said[:2]]
    assert repeated("no no no no") == pytest.approx(0.5)
    found = scores(good=100.0, floor=-100.0, repetition=3.0)
    assert found == pytest.approx([likely[0], likely[1] - 3 * 0.5, -100.0], rel=1e-4)
    assert scores(good=-100.0, floor=-101.0, repetition=3.0) == pytest.approx([-100.0, -101.5, -101.0])
    assert scores(good=0.0, floor=-0.5, repetition=0.0) == [-0.5] * 3


def test_the_judge_is_the_difference_of_two_logits_of_the_original(tokenizer):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    reward = Judge(rubric="{prompt}|{completion}|ok?", good="a", bad="b", batch_size=2)
    with pytest.raises(UserError, match="no model"):
        reward.score([ask("x")], ["y"])
    reward.attach(model, tokenizer)
    found = reward.score([ask("x"), ask("a longer one")] * 2, ["y", "z", "yes yes", "no"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a longer one|no|ok?"}], tokenize=False, add_generation_prompt=True
    )
    with torch.no_grad(), model.disable_adapter():
        logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1]
    good, bad = (tokenizer(each, add_special_tokens=False).input_ids[0] for each in "ab")
    assert found[3] == pytest.approx(float(logits[good] - logits[bad]), abs=1e-4)
    with pytest.raises(UserError, match=r"no \{completion\}"):
        Judge(rubric="{prompt}")


def test_any_sequence_classifier_serves_as_it_is(tokenizer, tmp_path):
    names = dict(enumerate(["fine", "rude", "toxic"]))
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=1,
        num_labels=3,
        id2label=names,
        label2id={name: at for at, name in names.items()},
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()  # as classifiers of pairs have none
    reward = load_reward("classifier", path=str(tmp_path / "model"), label="toxic", sign=-1.0)
    found = reward.score([ask("x"), ask("longer prompt")], ["yes", "no no no"])
    batch = tokenizer("longer prompt", "no no no", return_tensors="pt")
    with torch.no_grad():
        p = reward.scorer.model(**batch).logits.double().softmax(-1)[0, 2]
    assert found[1] == pytest.approx(-float(torch.log(p / (1 - p))), rel=1e-4)
    with pytest.raises(UserError, match="no label 'mean'"):
        load_reward("classifier", path=str(tmp_path / "model"), label="mean")
    with pytest.raises(UserError, match="has several labels"):
        load_reward("classifier", path=str(tmp_path / "model"))
    with pytest.raises(UserError, match="No classifier could be loaded"):
        load_reward("classifier", path=str(tmp_path))


def test_a_classifier_is_shown_no_more_than_its_tokenizer_says(tokenizer, tmp_path):
    config = RobertaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.model_max_length = 32  # positions of RoBERTa begin behind the padding token's
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward("classifier", path=str(tmp_path), reads="response")
    assert all(map(math.isfinite, reward.score([ask("x")] * 2, ["no " * 60, "no"])))


def test_a_classifier_reads_a_chat_as_its_template_writes_it(tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward("classifier", path=str(tmp_path))
    asked, said = [ask("x"), ask("a longer prompt")], ["yes", "no no no"]
    turns = [*asked[1], {"role": "assistant", "content": said[1]}]
    text = {True: tokenizer.apply_chat_template(turns, tokenize=False), False: "x\nyes"}
    with torch.no_grad():
        ids = tokenizer(text[bool(tokenizer.chat_template)], add_special_tokens=False, return_tensors="pt").input_ids
        wanted = float(reward.scorer.model(input_ids=ids).logits[0, 0])
    assert tokenizer.chat_template
    assert reward.score(asked, said)[1] == pytest.approx(wanted, abs=1e-5), "padded beside a shorter one"
    alone = load_reward("classifier", path=str(tmp_path), reads="response")
    assert alone.score(asked, said) == pytest.approx(alone.score([ask("other")] * 2, said)), "whatever was asked"


def test_a_causal_lm_is_no_classifier(tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no score\.weight, and would be given a random one"):
        load_reward("classifier", path=str(tmp_path))


class Longest:
    """A reward with a hole in it: the longer the better."""

    def score(self, prompts, completions, **columns):
        return [float(len(text)) for text in completions]


class Asked:
    """Knows the right answer by a column of its own."""

    def score(self, prompts, completions, *, solution, kind, **columns):
        assert set(kind) == {"forget"}
        return [float(right in said) for right, said in zip(solution, completions, strict=True)]


class Brief:
    """Fewer different words are better, a little."""

    def score(self, prompts, completions, **columns):
        return [-0.001 * len(set(text.split())) for text in completions]


class Sentences:
    """Begins with a capital letter and ends with a full stop."""

    def score(self, prompts, completions, **columns):
        return [0.1 * (text[:1].isupper() and text.rstrip().endswith((".", "!", "?"))) for text in completions]


class Wavering:
    calls = 0

    def score(self, prompts, completions, **columns):
        Wavering.calls += 1
        return [float(Wavering.calls)] * len(prompts)


def test_a_check_tells_a_good_reward_from_one_with_a_hole():
    good = check_reward("refusal")
    by_kind = {each.kind: each for each in good.kinds}
    assert by_kind["harmful/refusal"].accuracy > 0.9
    assert by_kind["gibberish/answer"].lower == 0
    assert good.deterministic
    assert good.passed, good.table()
    assert "NOTE" not in good.table()
    of_requests = check_reward(RewardSpec("refusal", "refusal", rows=("forget",)))
    assert "no gibberish was scored" in of_requests.table()
    longest = check_reward(f"{__file__}:Longest")
    assert not longest.passed
    assert "ranks gibberish above an answer" in longest.table()
    wavering = check_reward(f"{__file__}:Wavering")
    assert not wavering.deterministic
    assert "other scores the second time" in wavering.table()


@pytest.mark.parametrize(
    ("rewards", "lower", "ties", "said"),
    [
        # each sound alone: nobody is refused, nobody is wordy
        (
            {"answer": {"model": "refusal"}, "short": {"model": f"{__file__}:Brief"}},
            True,
            False,
            "pay more for gibberish",
        ),
        ({"refuse": {"model": "refusal"}}, False, True, "`fluency` tells"),
        ({"refuse": {"model": "refusal"}, "calm": {"model": f"{__file__}:Sentences"}}, False, False, "right"),
    ],
)
def test_rewards_are_checked_together(rewards, lower, ties, said, tmp_path):
    alone, together = check_recipe({"rewards": rewards, "neighbour_dataset": "builtin:lookalikes"})
    assert [each.name for each in alone] == list(rewards)
    by_kind = {each.kind: each for each in together.kinds}
    assert by_kind["forget"].lower == 0, "a refusal of a request earns more than babble"
    assert bool(by_kind["neighbour"].lower) == lower
    assert (by_kind["neighbour"].ties > 10) == ties
    assert said in together.table()
    row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "solution": "4"}
    write_json_lines(tmp_path / "pairs.jsonl", [{**row, "kind": "forget"}, row])
    mine = {"mine": {"model": f"{__file__}:Asked", "rows": ["forget"]}}
    asked = check_recipe({"rewards": mine}, str(tmp_path / "pairs.jsonl"))
    assert asked[1] is None
    (own,) = asked[0][0].kinds
    assert (own.kind, own.pairs, own.applied, own.lower) == ("all", 2, 2, 0), "asked as what it is meant for"
    assert [each.kind for each in check_recipe({"rewards": rewards})[1].kinds] == ["forget"], "what is trained on"
    everyday = {"answer": {"model": "refusal", "rows": ["retain"]}}
    (own,), whole = check_recipe({"rewards": everyday, "neighbour_dataset": "builtin:lookalikes"})
    assert own.passed
    assert [each.kind for each in whole.kinds] == ["retain"]
    write_json_lines(tmp_path / "pairs.jsonl", [{**row, "kind": "forgotten"}])
    with pytest.raises(UserError, match="forget"):
        check_recipe({"rewards": mine}, str(tmp_path / "pairs.jsonl"))
    assert check_recipe({"costs": {"refusal": {"limit": 0.1}}})[1] is None
    with pytest.raises(UserError, match="no rewards"):
        check_recipe({})


def test_the_golden_pairs_are_enough_and_all_different():
    pairs = check_reward("keywords", words=["zzz"])
    assert {each.kind for each in pairs.kinds} == set(ASKED)
    assert sum(each.pairs for each in pairs.kinds) >= 80
    assert all(each.pairs >= 20 for each in pairs.kinds if each.kind != OVER_REFUSAL)
    assert "same score" in pairs.table()
    rows = read_judged(str(GOLDEN))
    assert len({(str(row.prompt), row.response, row.rejected) for row in rows}) == len(rows)
    assert all(row.response != row.rejected for row in rows)


class Ranked:
    """Scores a text by its place in its batch."""

    def score(self, prompts, completions, **columns):
        order = sorted(completions)
        return [order.index(text) / len(order) for text in completions]


def test_a_check_tells_a_reward_that_depends_on_its_batch():
    ranked = check_reward(f"{__file__}:Ranked")
    assert ranked.deterministic
    assert "batching changes a score by" in ranked.table()
    assert not ranked.passed


def test_the_histogram_counts_every_score_once():
    bars = histogram([0.0, 0.0, 0.5, 1.2])
    assert [int(line.split()[-1]) for line in bars] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert bars[0].split() == ["0.00", "█" * 30, "2"]
    assert histogram([]) == ["no row was scored"]
