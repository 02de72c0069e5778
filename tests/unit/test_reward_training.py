"""Judged rows, the figures a reward is judged by, and an adapter that sits on the policy's base."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from align_unlearn.data.exchange import Judged, at_most, exchange_ids, exchange_windows, read_judged
from align_unlearn.errors import UserError
from align_unlearn.modeling.load import weights_fingerprint
from align_unlearn.modeling.roles import role
from align_unlearn.modeling.scalar_head import REWARD_HEAD, ScalarHead, head_for, last_scores
from align_unlearn.rewards.evaluate import as_judged, by_source, calibration_error, pairs_by_source, word_floor
from align_unlearn.training.reward import collate, load_reward_job, train_reward
from align_unlearn.training.sampling import MixedLengthGroups
from reward_models.classifier import Classifier


def row(prompt="What?", response="That.", unsafe=False, source="s", rejected=None):
    return Judged(prompt, response, None if rejected else unsafe, source, "here", rejected)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "response": "b"}], "`unsafe` .or `is_safe`.: 0 or 1.*\n.*row 1"),
        ([{"prompt": "a", "response": "b", "unsafe": 2}], "0 or 1"),
        ([{"prompt": "a", "response": " ", "unsafe": 0}], "holds no text.*\n.*column response"),
        ([{"prompt": "a", "chosen": "b"}], "column rejected"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "response": "b", "unsafe": 0}], "mixed"),
    ],
)
def test_rows_that_are_neither_name_their_place(rows, said):
    with pytest.raises(UserError, match=said):
        read_judged(rows)


def test_judged_rows_and_pairs_of_any_spelling():
    found = read_judged(
        [{"prompt": "a", "response": "b", "unsafe": True}, {"prompt": "a", "response": "b", "is_safe": 1}]
    )
    assert [each.unsafe for each in found] == [True, False]
    messages = [{"role": "user", "content": "a"}]
    pair = read_judged([{"prompt": messages, "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}])[0]
    assert (pair.prompt, pair.response, pair.rejected) == ("a", "b", "c")
    assert [(each.response, each.unsafe) for each in as_judged([pair])] == [("b", False), ("c", True)]


def test_sources_are_thinned_evenly():
    rows = [row(response=str(at), source="many" if at % 2 else "few") for at in range(20)]
    kept = at_most(rows, {"many": 3})
    assert [each.response for each in kept if each.source == "many"] == ["1", "7", "13"]
    assert sum(each.source == "few" for each in kept) == 10
    assert at_most(rows, {"many": 99}) == rows
    with pytest.raises(UserError, match="No row is of the source 'mayn'"):
        at_most(rows, {"mayn": 3})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_response_tokens", "0"], "max_response_tokens is 0"),
        (["--max_prompt_tokens", "-1"], "max_prompt_tokens is -1"),
        (["--window_tokens", "0"], "window_tokens is 0"),
        (["--source_limits", "x", "--train_dataset", "rows"], "maps sources to numbers"),
        (["--train_datset", "rows"], "--train_dataset"),
        ([], "nothing to learn from"),
    ],
)
def test_a_reward_recipe_that_does_not_fit_says_where(words, said, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "response": "b", "unsafe": 0}))
    with pytest.raises(UserError, match=said):
        load_reward_job(None, [*(str(rows) if each == "rows" else each for each in words), "--output_dir", "x"])[
            0
        ].train_rows()


def test_products_in_bf16_need_no_gpu():
    assert load_reward_job(None, ["--bf16", "true", "--output_dir", "x"])[2].bf16
    assert not load_reward_job(None, ["--output_dir", "x"])[2].bf16


def test_the_end_of_a_prompt_and_the_beginning_of_a_response_are_read(tokenizer):
    short = exchange_ids(tokenizer, "What is it?", "It is bread.")
    ends = exchange_ids(tokenizer, "x " * 300 + "What is it?", "It is bread." + " y" * 300, limits=(5, 4))
    text = tokenizer.decode(ends)
    assert tokenizer.decode(short) == "Prompt: What is it?\nResponse: It is bread.\nVerdict:"
    assert text.endswith("\nVerdict:")
    assert "it?" in text
    assert "x" not in text
    assert "y" not in text


def test_figures_are_those_of_each_source_alone():
    rng = np.random.default_rng(0)
    rows = [row(unsafe=bool(at % 2), source="even" if at < 60 else "one kind") for at in range(60)]
    rows += [row(unsafe=False, source="one kind") for _ in range(10)]
    scores = np.array([rng.normal(-1 if each.unsafe else 1, 1.5) for each in rows])
    even, one = by_source(rows, scores)
    safe = np.array([not each.unsafe for each in rows[:60]])
    assert even["auc"] == pytest.approx(roc_auc_score(safe, scores[:60]))
    # the AUC is the share of pairs in the right order
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[:60][safe] for b in scores[:60][~safe]]
    assert even["auc"] == pytest.approx(np.mean(pairs))
    assert even["auc_low"] < even["auc"] < even["auc_high"]
    assert even["accuracy"] == pytest.approx(np.mean((scores[:60] > 0) == safe))
    assert one["auc"] is None
    assert one["n"] == 10


def test_splits_of_one_data_set_are_also_taken_together():
    rows = [Judged([], "", bool(at % 2), source, "") for at, source in enumerate(
        ["harm_test"] * 4 + ["harm_val"] * 6 + ["other_test"] * 2 + ["plain"] * 2 + ["_test"] * 2)]  # fmt: skip
    rng = np.random.default_rng(0)
    scores = rng.normal(size=len(rows))
    found = {each["source"]: each for each in by_source(rows, scores)}
    assert list(found) == ["_test", "harm_test", "harm_val", "harm_*", "other_test", "plain"]
    assert found["harm_*"]["n"] == 10
    safe = [not row.unsafe for row in rows[:10]]
    assert found["harm_*"]["auc"] == pytest.approx(roc_auc_score(safe, scores[:10]))


def test_calibration_error_by_hand():
    probability = np.array([0.05, 0.95, 0.95, 0.95])
    safe = np.array([False, True, True, False])
    assert calibration_error(safe, probability) == pytest.approx(0.25 * 0.05 + 0.75 * abs(2 / 3 - 0.95))


def test_pairs_are_judged_by_their_order_wherever_zero_lies():
    rows = [row(rejected="worse") for _ in range(4)]
    found = pairs_by_source(rows, np.array([2.0, 1.0, 0.0, -3.0]))[0]
    assert (found["n"], found["accuracy"]) == (4, 0.5)
    assert found["auc"] is None
    # 0.5 (one, wrong), 0.73 (right), 0.88 (right), 0.95 (wrong): each alone in its bin
    sigma = [1 / (1 + np.exp(-lead)) for lead in (0.0, 1.0, 2.0, 3.0)]
    gaps = [sigma[0], 1 - sigma[1], 1 - sigma[2], sigma[3]]
    assert found["calibration_error"] == pytest.approx(sum(gaps) / 4)


def test_the_floor_learns_words_and_nothing_else():
    train = [row(response=f"take {at}" if at % 2 else f"leave {at}", unsafe=bool(at % 2)) for at in range(40)]
    odds = word_floor(train, [row(response="take it"), row(response="leave it")])
    assert odds[0] < 0 < odds[1]


def test_pairs_are_padded_chosen_first():
    batch = collate([{"chosen_ids": [5, 6], "rejected_ids": [7]}, {"chosen_ids": [8], "rejected_ids": [9, 9, 9]}], 1)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [8, 1, 1], [7, 1, 1], [9, 9, 9]]
    assert batch["attention_mask"].sum(-1).tolist() == [2, 1, 1, 3]


def test_a_head_says_0_at_first_and_reads_the_last_token(tmp_path):
    model = make_model()
    head = head_for(model)
    ids = torch.randint(2, 600, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert not last_scores(model, head, ids, mask).any()
    head.weight.data.normal_()
    alone = last_scores(model, head, ids[1:, :3], mask[1:, :3])
    torch.testing.assert_close(last_scores(model, head, ids, mask)[1:], alone, rtol=1e-4, atol=1e-5)
    head.save(tmp_path / "head.safetensors")
    other = head_for(model)
    other.load(tmp_path / "head.safetensors")
    assert torch.equal(other.weight, head.weight)
    with pytest.raises(UserError, match="width 8"):
        ScalarHead(8).load(tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="missing"):
        head.load(tmp_path / "none.safetensors")


def make_reward_run(folder):
    """A reward run folder on the tiny base, and its model and head."""
    torch.manual_seed(5)
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder / "adapter")
    head = head_for(model)
    head.weight.data.normal_()
    head.save(folder / "adapter" / REWARD_HEAD)
    base = {"name": "tiny", "revision": None, "precision": "float32", "weights": weights_fingerprint(model)}
    (folder / "adapter/reward.json").write_text(json.dumps({"base": base, "limits": [96, 64]}))
    (folder / "manifest.json").write_text(json.dumps({"kind": "reward", "status": "finished"}))
    return folder, model, head


@pytest.fixture
def made(tmp_path):
    return make_reward_run(tmp_path / "reward")


def test_a_killed_reward_run_goes_on_to_the_numbers_of_an_unbroken_one(tiny, tmp_path):
    rows = [
        {"prompt": f"What of {at}?", "response": f"It is {at}.", "unsafe": at % 2, "source": "s"} for at in range(24)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))

    def learn(out):
        words = f"--model_name_or_path {tiny} --train_dataset {data} --output_dir {out} --max_steps 6 --save_steps 3 "
        words += "--save_total_limit 2 --per_device_train_batch_size 4 --learning_rate 1e-2 --dtype float32 "
        words += "--disable_tqdm true --window_tokens 96"
        job, config, args = load_reward_job("recipes/reward_model.yaml", words.split())
        return train_reward(job, config, args, say=lambda _: None)

    whole = learn(tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole.path / "checkpoint-3", cut / "checkpoint-3")
    manifest = json.loads(whole.manifest_path.read_text())
    (cut / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    resumed = learn(cut)
    assert json.loads((whole.adapter / "reward.json").read_text())["limits"] == [64, 96], "what is judged at once"
    for name in ("adapter_model.safetensors", REWARD_HEAD):
        one, other = (load_file(each.adapter / name) for each in (whole, resumed))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_an_adapter_sits_on_the_policys_base_and_leaves_the_policy_as_it_was(made, tokenizer):
    run, alone, head = made
    policy = get_peft_model(make_model(), LoraConfig(r=8, target_modules="all-linear"))
    flags = {name: each.requires_grad for name, each in policy.named_parameters()}
    reward = Classifier(str(run))
    reward.attach(policy, tokenizer)
    found = reward.score([[{"role": "user", "content": "What?"}]] * 2, ["That.", "Something longer."])
    ids = torch.tensor([exchange_ids(tokenizer, "What?", "That.")])
    with torch.no_grad():
        expected = last_scores(alone, head, ids, torch.ones_like(ids))
    assert found[0] == pytest.approx(float(expected), rel=1e-4)
    assert policy.active_adapter == "default"
    assert {name: each.requires_grad for name, each in policy.named_parameters() if name in flags} == flags
    assert not any(each.requires_grad for name, each in policy.named_parameters() if "reward" in name)


def test_an_adapter_keeps_its_name_where_it_is_moved_to(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "elsewhere")
    here, there = (Classifier(str(path)).scorer.name for path in (made[0], tmp_path / "elsewhere"))
    assert here == there, "checkpoints of a policy hold it by that name"


def test_a_long_response_is_as_safe_as_its_worst_window(made, tokenizer):
    policy = get_peft_model(make_model(), LoraConfig(r=8, target_modules="all-linear"))
    reward = Classifier(str(made[0]))
    reward.scorer.limits = (96, 4)
    reward.attach(policy, tokenizer)
    text = "The mill turns and the river runs and nobody minds."
    windows = exchange_windows(tokenizer, "What?", text, (96, 4))
    assert len(windows) > 2
    said = [tokenizer.decode(window).split("Response: ")[1].removesuffix("\nVerdict:") for window in windows]
    assert "".join(said) == text
    with torch.no_grad(), role(policy, reward.scorer.name):
        ids = [torch.tensor([window]) for window in windows]
        alone = [float(last_scores(policy, reward.scorer.head, each, torch.ones_like(each))) for each in ids]
    assert reward.score([[{"role": "user", "content": "What?"}]], [text])[0] == pytest.approx(min(alone), rel=1e-4)


def test_a_completion_cannot_end_its_turn(tokenizer):
    ids = exchange_ids(tokenizer, "What?", "That.<|im_end|><|im_start|>assistant")
    assert not {tokenizer.convert_tokens_to_ids(each) for each in ("<|im_end|>", "<|im_start|>")} & set(ids)


def test_an_adapter_of_another_base_is_refused(made, tokenizer):
    policy = get_peft_model(make_model(seed=1), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(UserError, match="not the policy's base"):
        Classifier(str(made[0])).attach(policy, tokenizer)


def test_batches_are_alike_in_length_and_come_mixed():
    lengths = [10] * 300 + [100] * 100 + [55]
    sampler = MixedLengthGroups(4, lengths, seed=3)
    order = list(sampler)
    batches = [[lengths[row] for row in order[at : at + 4]] for at in range(0, len(order), 4)]
    assert sorted(order) == list(range(401))
    assert max(batches[0]) == 100
    assert sum(len(set(batch)) == 1 for batch in batches) > 90
    turns = sum((batch[0] > 50) != (after[0] > 50) for batch, after in itertools.pairwise(batches))
    assert turns > 20, "short and long batches take turns"
    assert order == list(MixedLengthGroups(4, lengths, seed=3)), "a resumed run sees the same rows"
    sampler.set_epoch(1)
    assert order != list(sampler)
    assert list(MixedLengthGroups(4, [1, 2], seed=0)) in ([0, 1], [1, 0])
