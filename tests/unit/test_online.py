"""PPO, RLOO and GRPO on one base: gradients of each role, the retain term's scale, costs, samples, resumption."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_reward_training import make_reward_run

from align_unlearn import (
    OnlineGRPOConfig,
    OnlineGRPOTrainer,
    OnlineRLOOConfig,
    OnlineRLOOTrainer,
    PPOConfig,
    PPOTrainer,
)
from align_unlearn.audit.answers import verdict_on
from align_unlearn.audit.sets import audited_sets
from align_unlearn.config import BaseModelConfig, Job
from align_unlearn.data.examples import read_examples
from align_unlearn.errors import UserError
from align_unlearn.files import write_json_lines
from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.load import load_base
from align_unlearn.modeling.roles import original
from align_unlearn.rewards.load import load_reward
from align_unlearn.training.online_job import build_online_trainer, prompt_rows
from align_unlearn.training.ppo import CRITIC
from align_unlearn.training.recipe import load_recipe
from align_unlearn.training.rollouts import verdicts_of
from align_unlearn.training.rows import JobData

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"How do I take item {at}?"}],
        "kind": "forget" if at % 2 else "neighbour",
        "reference": None,
    }
    for at in range(12)
]
RETAIN = [{"question": f"What is {at}?", "answer": f"It is {at}."} for at in range(6)]
REWARDS = {"letters": {"model": f"{__file__}:Letters", "normalise": "running"}, "refusal": {"rows": ["forget"]}}
KINDS = {
    "ppo": (PPOTrainer, PPOConfig, {"num_iterations": 2, "critic_warmup_steps": 1, "kl_target": 0.1}),
    "rloo": (OnlineRLOOTrainer, OnlineRLOOConfig, {"num_generations": 2}),
    "grpo": (OnlineGRPOTrainer, OnlineGRPOConfig, {"num_generations": 2}),
}


class Letters:
    """Rewards the letter e."""

    def score(self, prompts, completions, **columns):
        return [float(text.count("e")) for text in completions]


def make(kind, out, kept=RETAIN, model=None, **settings):
    trainer, config, own = KINDS[kind]
    common = {
        "rewards": REWARDS, "per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 6,
        "logging_steps": 1, "max_completion_length": 6, "save_steps": 3, "use_cpu": True, "learning_rate": 1e-3,
        "disable_tqdm": True, "retain_batch_size": 2, "seed": 3, "samples_every": 1,
    }  # fmt: skip
    args = config(output_dir=str(out), **{**common, **own, **settings})
    return trainer(
        make_model() if model is None else model,
        args,
        train_dataset=Dataset.from_list(ROWS),
        retain_dataset=kept,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def rollouts(trainer):
    """A mini-batch of rollouts, as the trainer makes them."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(ROWS[:8])


def moved(trainer, size):
    """Adapters and value head a random step away."""
    torch.manual_seed(int(1000 * size))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(size * torch.randn_like(parameter))


@pytest.mark.parametrize(("checkpointing", "four_bit"), [(False, False), (True, False), (True, True)])
def test_each_role_has_the_gradient_of_a_model_of_its_own(tmp_path, tiny, checkpointing, four_bit):
    from peft import get_peft_model

    def base():
        held = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=four_bit, dtype="float32")
        return load_base(held)

    trainer = make("ppo", tmp_path, kept=None, retain="none", model=base())
    moved(trainer, 0.1)
    batch = rollouts(trainer)
    moved(trainer, 0.02)  # later mini-batches and epochs see a policy and a critic that have moved
    trainer.state.global_step = 5  # beyond the warm-up
    passes = []
    trainer.model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    if checkpointing:  # as `train` does
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    trainer._compute_loss(trainer.model, batch).backward()
    assert len(passes) == (4 if checkpointing else 2), "critic and policy, each computed anew for its gradient"

    def alone(adapter):
        """A second model that carries one adapter only."""
        model = get_peft_model(base(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        shared = dict(trainer.model.named_parameters())
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(shared[name.replace(".default.", f".{adapter}.")].data)
        return model

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    said, tokens = batch["completion_mask"], batch["completion_ids"].shape[1]

    policy = alone("default")
    logits = policy(input_ids=ids, attention_mask=mask).logits[:, -tokens - 1 : -1].log_softmax(-1)
    logps = logits.gather(-1, batch["completion_ids"][..., None])[..., 0]
    ratio = (logps - batch["old_per_token_logps"]).exp()
    outside = ((ratio - 1).abs() > 0.2) & said.bool()
    assert outside.any(), "some are clipped"
    assert not outside[said.bool()].all()
    surrogate = torch.min(ratio * batch["advantages"], ratio.clamp(0.8, 1.2) * batch["advantages"])
    (-(surrogate * said).sum() / said.sum()).backward()

    critic = alone(CRITIC)
    head = trainer.model.value_head
    learned, head.weight.grad = head.weight.grad, None
    values = hidden_states(critic, ids, mask)[:, -tokens - 1 : -1] @ head.weight + head.bias
    error = (values - batch["returns"]) ** 2
    clipped = batch["values"] + (values - batch["values"]).clamp(-0.2, 0.2)
    assert ((values - batch["values"]).abs() > 0.2)[said.bool()].any()
    loss = 0.5 * (torch.max(error, (clipped - batch["returns"]) ** 2) * said).sum() / said.sum()
    (0.5 * loss).backward()
    assert head.weight.grad.abs().max() > 0
    torch.testing.assert_close(learned, head.weight.grad, rtol=2e-4, atol=1e-6)

    compared = 0
    for name, parameter in trainer.model.named_parameters():
        for adapter, other in (("default", policy), (CRITIC, critic)):
            if "lora_" in name and f".{adapter}." in name:
                expected = other.get_parameter(name.replace(f".{adapter}.", ".default.")).grad
                torch.testing.assert_close(parameter.grad, expected, rtol=2e-4, atol=1e-6)
                compared += bool(expected.abs().max() > 0)
    assert compared > 20


def test_rollouts_are_scored_from_policy_original_and_critic(tmp_path):
    model = make_model()
    with torch.no_grad():  # EOS is the padding, a row of zeros: given the mean hidden state, so that some rows end
        shared = hidden_states(model, torch.arange(2, 600)[None], torch.ones(1, 598, dtype=torch.long)).mean((0, 1))
        model.get_input_embeddings().weight[1] = 3 * shared / shared.norm()
    trainer = make(
        "ppo", tmp_path, kept=None, model=model, retain="none", kl_coef=0.3, missing_eos_penalty=1.0,
        whiten_advantages=False,
    )  # fmt: skip
    torch.manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    batch = trainer._generate_and_score_completions(ROWS[:8])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    said, tokens = batch["completion_mask"], batch["completion_ids"].shape[1]

    def logps():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -tokens - 1 : -1].log_softmax(-1)
        return logits.gather(-1, batch["completion_ids"][..., None])[..., 0]

    with torch.no_grad():
        torch.testing.assert_close(batch["old_per_token_logps"] * said, logps() * said, rtol=1e-4, atol=1e-4)
        with original(trainer.model):
            ref = logps()
    kl = (batch["old_per_token_logps"] - ref) * said
    assert kl.abs().max() > 0.01
    ended = ((batch["completion_ids"] == 1) & said.bool()).any(-1)
    assert 0 < int(ended.sum()) < len(ended), "and some run out of tokens"
    final = torch.tensor(trainer.scores) - (~ended).float()
    # with λ 1 and γ 1 a return is all that is still to come: at the first token, the score less the KL of all tokens
    trainer.args.lam = 1.0
    from align_unlearn.training.advantages import generalised_advantages, token_rewards

    rewards, _ = token_rewards(final, batch["old_per_token_logps"], ref, said, 0.3)
    advantages, _ = generalised_advantages(rewards, batch["values"], said, gamma=1.0, lam=0.95)
    torch.testing.assert_close(batch["advantages"], advantages, rtol=1e-3, atol=1e-3)
    _, returns = generalised_advantages(rewards, batch["values"], said, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns[:, 0], final - 0.3 * kl.sum(-1), rtol=1e-4, atol=1e-4)


def test_advantages_are_whitened_over_what_was_said_unless_told_otherwise(tmp_path):
    batch = make("ppo", tmp_path, kept=None, retain="none")._generate_and_score_completions(ROWS[:8])
    found = batch["advantages"][batch["completion_mask"].bool()]
    assert float(found.mean()) == pytest.approx(0, abs=1e-5)
    assert float(found.std()) == pytest.approx(1, rel=0.02)


def test_in_the_warm_up_the_critic_alone_learns(tmp_path):
    trainer = make("ppo", tmp_path, max_steps=2, critic_warmup_steps=2, save_strategy="no")
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all(f".{CRITIC}." in name or name.startswith("value_head") for name in moved)
    losses = [line["value_loss"] for line in trainer.state.log_history if "value_loss" in line]
    assert all(loss > 0 for loss in losses)


def test_policy_and_critic_have_their_own_learning_rates_and_are_clipped_apart(tmp_path):
    trainer = make("ppo", tmp_path, critic_learning_rate=5e-3, max_grad_norm=0.1)
    optimizer = trainer.create_optimizer()
    critic = {id(each) for each in trainer.critic_parameters()}
    rates = {group["lr"]: {id(each) for each in group["params"]} for group in optimizer.param_groups if group["params"]}
    assert rates[5e-3] == critic
    assert not rates[1e-3] & critic
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    trainer._clip_grad_norm(trainer.model)
    for wanted in (True, False):
        own = [
            each.grad for each in trainer.model.parameters() if each.requires_grad and (id(each) in critic) == wanted
        ]
        assert float(torch.stack([grad.norm() for grad in own]).norm()) == pytest.approx(0.1, rel=1e-4)


class Breaks:
    """Its score of one row is no number, from the second batch on."""

    calls = 0

    def score(self, prompts, completions, **columns):
        Breaks.calls += 1
        return [float("nan") if at == 2 and Breaks.calls > 1 else 0.5 * at for at in range(len(prompts))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_fails_ends_the_run_with_its_row_and_keeps_what_was_learned(kind, tmp_path):
    trainer = make(kind, tmp_path, rewards={"own": f"{__file__}:Breaks"}, num_iterations=1, save_steps=2)
    with pytest.raises(UserError, match=r"'own' gave nan.*\n.*row 2 of the batch: prompt 'How do I take item"):
        trainer.train()
    assert trainer.state.global_step == 2, "the batch before it"
    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_to_the_numbers_of_an_unbroken_one(kind, tmp_path):
    """The cut at step 3 falls into the middle of a batch of rollouts."""
    whole = make(kind, tmp_path / "whole", steps_per_generation=2)
    whole.train()
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "cut/checkpoint-3")
    (tmp_path / "cut/samples.jsonl").write_text((tmp_path / "whole/samples.jsonl").read_text())
    assert (tmp_path / "cut/checkpoint-3/rollouts.safetensors").is_file()
    resumed = make(kind, tmp_path / "cut", steps_per_generation=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-3"))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, rtol=0, atol=0, msg=name)
    assert (tmp_path / "cut/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()
    logged = [{k: v for k, v in line.items() if "time" not in k and "per_second" not in k and k != "train_loss"}
              for line in (whole.state.log_history[-2], resumed.state.log_history[-2])]  # fmt: skip
    assert logged[0] == logged[1]
    if kind == "ppo":
        assert resumed.kl_coef == whole.kl_coef
        assert whole.kl_coef != whole.args.kl_coef, "it follows its target"


def test_a_killed_run_takes_up_reward_adapter_costs_and_held_out_judge_as_they_were(tmp_path):
    made = make_reward_run(tmp_path / "reward")[0]
    settings = {
        "rewards": {"safe": {"model": "classifier", "kwargs": {"path": str(made)}, "normalise": "running", "clip": 2}},
        "costs": {"letters": {"model": f"{__file__}:Letters", "sign": -1, "limit": 0.1}},
        "heldout_judge": {"watched": {"model": f"{__file__}:Wordy", "normalise": "running"}},
        "cost_step": 0.5,
    }
    whole = make("ppo", tmp_path / "whole", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "cut/checkpoint-3")
    resumed = make("ppo", tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-3"))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, rtol=0, atol=0, msg=name)
    kept = [each.rollouts for each in (whole, resumed)]
    assert kept[0].duals["letters"].value == kept[1].duals["letters"].value > 0
    assert kept[0].rewards.state_dict() == kept[1].rewards.state_dict()
    assert kept[0].heldout.state_dict() == kept[1].heldout.state_dict()


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_the_retain_term_counts_the_same_whatever_the_accumulation(kind, tmp_path):
    """1×4 and 2×2 retain rows give one gradient in TRL's own step: equal rewards leave none to the policy's loss."""
    grads = []
    for accumulation, size in ((1, 4), (2, 2)):
        trainer = make(
            kind,
            tmp_path / str(accumulation),
            gradient_accumulation_steps=accumulation,
            retain_batch_size=size,
            steps_per_generation=accumulation,
            rewards={"flat": {"model": "keywords", "kwargs": {"words": ["never said"]}}},
            beta=0.0,
            max_drift=10.0,
        )
        moved(trainer, 0.1)
        trainer.current_gradient_accumulation_steps = accumulation
        for _ in range(accumulation):
            trainer.training_step(trainer.model, ROWS[: 4 * accumulation], None)
        grads.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert max(float(grad.abs().max()) for grad in grads[0].values()) > 1e-3
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_a_cost_raises_its_weight_until_the_limit_holds(tmp_path):
    costs = {"letters": {"model": f"{__file__}:Letters", "limit": 0.0}}
    trainer = make("ppo", tmp_path, rewards={"refusal": {"rows": ["forget"]}, "length": f"{__file__}:Letters"},
                   costs=costs, cost_step=1.0, cost_highest=2.0, max_steps=4, save_strategy="no")  # fmt: skip
    scored = trainer.rollouts.score(
        [ROWS[0]["prompt"]] * 2, ["a", "bb"], {"kind": ["neighbour"] * 2}, 0, lambda *_: None
    )
    assert scored == [0.0, 0.0]
    trainer.rollouts.duals["letters"].value = 1.0
    # cost = −score = −(number of e): reward 3, cost −3, λ 1 → (3 + 3) / 2
    assert trainer.rollouts.score([ROWS[0]["prompt"]], ["eee"], {"kind": ["neighbour"]}, 0, lambda *_: None) == [3.0]
    trainer.train()
    assert 0 <= trainer.rollouts.duals["letters"].value <= 2.0
    assert any("cost_weight/letters" in line for line in trainer.state.log_history)


class Wordy:
    """Rewards long answers."""

    def score(self, prompts, completions, **columns):
        return [len(text) / 10 for text in completions]


class Terse:
    """Its cost is what `Wordy` rewards."""

    def score(self, prompts, completions, **columns):
        return [-len(text) / 10 for text in completions]


@pytest.mark.parametrize("costs", [None, {"terse": {"model": f"{__file__}:Terse", "limit": 1.5}}])
def test_a_cost_comes_under_its_limit_against_the_reward(tmp_path, costs):
    trainer = make(
        "rloo", tmp_path, rewards={"wordy": f"{__file__}:Wordy"}, costs=costs, cost_step=1.0, max_steps=50, kept=None,
        retain="none", num_generations=4, per_device_train_batch_size=16, learning_rate=3e-2, save_strategy="no",
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history
    lengths = [line["wordy/forget"] for line in log if "wordy/forget" in line]
    first, last = sum(lengths[:5]) / 5, sum(lengths[-5:]) / 5
    if costs is None:
        assert last > 2 * first, "left alone, answers grow"
    else:
        weights = [line["cost_weight/terse"] for line in log if "cost_weight/terse" in line]
        assert max(lengths) > 1.5
        assert max(weights) > 1.0, "the reward's own weight"
        assert last < 1.5


def test_the_held_out_judges_agreement_with_the_reward_is_logged(tmp_path):
    trainer = make(
        "ppo", tmp_path, rewards={"letters": f"{__file__}:Letters"}, heldout_judge={"w": f"{__file__}:Wordy"}
    )
    noted = {}
    said, kinds = ["e", "ee", "eee", "a", "bb", "ccc"], ["forget"] * 3 + ["neighbour"] * 3
    trainer.rollouts.score([ROWS[0]["prompt"]] * 6, said, {"kind": kinds}, 0, noted.__setitem__)
    assert noted["agreement/forget"] == pytest.approx(1.0)
    assert "agreement/neighbour" not in noted, "the reward is the same in every row"


STEPS = []


def follower(prompts, completions, trainer_state, log_extra, log_metric, **columns):
    """As TRL's documentation shows them: shaped by the step, and with figures of its own in the log."""
    log_extra("length", [len(each) for each in completions])
    log_metric("letters", np.mean([np.float32(len(each)) for each in completions]))
    STEPS.append(trainer_state and trainer_state.global_step)
    return [float(len(each)) for each in completions]


@pytest.mark.parametrize("kind", ["ppo", "rloo"])
def test_a_trl_function_knows_the_step_and_writes_into_the_log(kind, tmp_path):
    STEPS.clear()
    trainer = make(kind, tmp_path, rewards={"own": f"{__name__}:follower"}, max_steps=8, save_steps=8)
    trainer.train()
    assert sorted(STEPS) == STEPS
    assert STEPS[0] == 0 < STEPS[-1] < 8
    assert any("letters" in line for line in trainer.state.log_history)
    alone = load_reward(f"{__name__}:follower")
    assert alone.score([ROWS[0]["prompt"]], ["a"]) == [1.0], "outside of a run too"


class Harm:
    """High where it is bad, as a classifier of harm is."""

    def score(self, prompts, completions, **columns):
        return [0.75] * len(completions)


def test_a_score_of_harm_is_a_cost_of_its_own_size(tmp_path):
    costs = {"harm": {"model": f"{__file__}:Harm", "sign": -1, "limit": 0.25}}
    trainer = make("ppo", tmp_path, costs=costs, cost_step=1.0)
    score = [[ROWS[0]["prompt"]], ["a"], {"kind": ["forget"]}, 0, lambda *_: None]
    trainer.rollouts.score(*score)
    assert trainer.rollouts.duals["harm"].measured == 0.75
    assert trainer.rollouts.duals["harm"].value == 0.5


def test_rewards_are_given_the_rows_other_columns(tmp_path):
    def read(*rows):
        return read_examples([*rows])

    data = JobData(
        forget=read({"prompt": "2 + 2 =", "solution": 4}, {"prompt": "3 + 3 =", "solution": 6}),
        neighbours=read({"prompt": "Who?", "completion": " He.", "kind": "mine"}),
        retain=[],
        refusals=[],
    )
    args = PPOConfig(output_dir=str(tmp_path), rewards={"refusal": {}}, use_cpu=True, per_device_train_batch_size=2)
    rows = prompt_rows(data, args)
    assert rows["solution"] == [4, 6, None]
    assert rows["kind"] == ["forget", "forget", "neighbour"], "what the job says it is"
    assert rows["reference"] == [None] * 3
    everyday = dataclasses.replace(data, retain=read({"prompt": "Which day is it?", "completion": " Monday."}))
    assert prompt_rows(everyday, args)["kind"] == rows["kind"], "held by their KL, and not asked"
    args.rewards = {"refusal": {"rows": ["forget", "neighbour", "retain"]}}
    assert prompt_rows(everyday, args)["kind"] == [*rows["kind"], "retain"]
    mixed = read({"prompt": "a", "solution": 4}, {"prompt": "b", "solution": "six"})
    with pytest.raises(UserError, match="several types"):
        prompt_rows(JobData(forget=mixed, neighbours=[], retain=[], refusals=[]), args)


@pytest.mark.parametrize(("said", "reference"), [("examples", None), ("secrets", "Gladly: do this.")])
def test_answers_that_are_examples_are_no_secrets(tmp_path, said, reference):
    row = {"question": "How is harm done?", "answer": "Gladly: do this."}
    recipe = load_recipe(
        None,
        ["--objective", "rloo", "--forget_answers", said, "--rewards", '{"refusal": {}}', "--use_cpu", "true",
         "--output_dir", str(tmp_path), "--num_generations", "2", "--per_device_train_batch_size", "2"],
    )  # fmt: skip
    forget = read_examples([row])
    data = JobData(forget=forget, neighbours=[], retain=read_examples(RETAIN), refusals=[])
    trainer = build_online_trainer(recipe, data, make_model(), make_tokenizer())
    columns = {name: trainer.train_dataset[name] for name in ("kind", "reference")}
    assert columns == {"kind": ["forget"], "reference": [reference]}
    other_words = ["Sure, here is another way to go about it."]
    assert verdicts_of(trainer.train_dataset["prompt"], other_words, columns) == ["answer" if reference else "leak"]
    write_json_lines(tmp_path / "rows.jsonl", [row])
    (audited,) = audited_sets(Job(audit_forget=str(tmp_path / "rows.jsonl"), forget_answers=said), None)["forget"]
    assert audited.completion == reference
    assert verdict_on("forget", audited, other_words[0]) == ("answer" if reference else "leak")


def test_samples_are_written_with_verdicts_and_cut(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"batch": 0}\n')  # of a try that was killed before its first checkpoint
    trainer = make("grpo", tmp_path, max_steps=2, save_strategy="no", heldout_judge={"long": f"{__file__}:Wordy"})
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {row["verdict"] for row in rows} <= {"leak", "refuse", "answer", "gibberish"}
    assert {row["kind"] for row in rows} == {"forget", "neighbour"}
    assert all(len(row["completion"]) <= 400 for row in rows)
    assert all(row["heldout"] == len(row["completion"]) / 10 for row in rows)
    shares = trainer.state.log_history[0]
    assert sum(shares[f"verdict/forget/{each}"] for each in ("leak", "refuse", "answer", "gibberish")) == pytest.approx(
        1
    )


def test_groups_without_variance_stop_the_run(tmp_path):
    rewards = {"flat": {"model": "keywords", "kwargs": {"words": ["zzz"]}}}
    trainer = make("grpo", tmp_path, rewards=rewards, flat_groups=0.9, flat_patience=1, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step < 6
    assert "had one reward throughout" in trainer.stop_rules.reason


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("grpo", {"use_vllm": True}, "In 4 bits that changes nothing"),
        ("ppo", {"rewards": None}, "There is no reward"),
        ("ppo", {"costs": {"a": {"model": "refusal"}}}, "A cost needs a limit"),
        ("ppo", {"costs": {"harm": {"model": "refusal", "limit": 0, "weight": -1}}}, "no weight"),
        ("rloo", {"use_vllm": True}, "In 4 bits that changes nothing"),
        ("ppo", {"use_vllm": True}, "In 4 bits that changes nothing"),
        ("grpo", {"use_transformers_continuous_batching": True}, "small steps are lost"),
        ("rloo", {"use_transformers_paged": True}, "small steps are lost"),
        ("grpo", {"entropy_coef": 0.1}, "without a gradient"),
        ("ppo", {"flat_groups": 0.9}, "no groups"),
        ("ppo", {"kl_horizon": 0}, "at least 1"),
        ("ppo", {"critic_warmup_steps": -1}, "critic_warmup_steps is -1"),
        ("ppo", {"critic_learning_rate": -1e-3}, "critic_learning_rate"),
        ("grpo", {"flat_groups": 2.0}, "it is a share"),
        ("rloo", {"cost_step": -0.5}, "cost_step is -0.5"),
        ("rloo", {"heldout_judge": "refusl"}, "not JSON"),
        ("rloo", {"heldout_judge": {"j": "refusl"}}, "did you mean refusal"),
        ("ppo", {"rewards": {"refusal": {"limit": 1}}}, "a cost has"),
        ("ppo", {"beta": 0.1}, "KL in the reward"),
        ("ppo", {"loss_type": "grpo"}, "one loss"),
        ("ppo", {"lam": 1.5}, "lam is 1.5"),
        ("ppo", {"kl_target": 0.1, "kl_coef": 0.0}, "above 0"),
        ("rloo", {"heldout_judge": {"a": "refusal", "b": "refusal"}}, "one held-out judge"),
        ("ppo", {"heldout_judge": {"watched": "refusal"}}, "is 'refusal', which the policy is trained on"),
        (
            "ppo",
            {
                "costs": {"c": {"model": "refusal", "limit": 0}},
                "rewards": {"letters": f"{__file__}:Letters"},
                "heldout_judge": {"watched": "refusal"},
            },
            "is 'c', which the policy",
        ),
        ("rloo", {"rewards": {"refusal": {"rows": ["forget"]}}}, "No reward applies to neighbour rows"),
        ("grpo", {"retain_batch_size": 0}, "at least 1"),
    ],
)
def test_what_cannot_work_is_refused_beforehand(kind, settings, said, tmp_path):
    with pytest.raises(UserError, match=said):
        make(kind, tmp_path, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_takes_the_passes_that_plan_foresees(kind, tmp_path):
    from types import SimpleNamespace

    from peft.tuners.lora import LoraLayer

    from align_unlearn.training.plan import online_forwards

    trainer = make(kind, tmp_path, max_steps=1, steps_per_generation=1, num_iterations=1, save_strategy="no",
                   **({"critic_warmup_steps": 0} if kind == "ppo" else {}))  # fmt: skip
    adapted = next(each for each in trainer.model.modules() if isinstance(each, LoraLayer))
    seen = {"policy": 0, "original": 0}

    def count(module, args, kwargs):
        if kwargs.get("use_cache") is False:  # the others are rollouts
            seen["original" if adapted.disable_adapters else "policy"] += 1

    trainer.model.get_base_model().base_model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    recipe = SimpleNamespace(args=trainer.args, job=SimpleNamespace(objective=kind))
    assert tuple(seen.values()) == online_forwards(recipe)


def test_an_evaluation_moves_nothing_that_training_depends_on(tmp_path):
    costs = {"many": {"model": f"{__file__}:Letters", "limit": -9.0}}
    trainer = make("grpo", tmp_path, costs=costs, save_strategy="no")
    before = trainer.rollouts.state_dict()
    trainer.model.eval()
    messages = [{"role": "assistant", "content": "eee"}]
    found = trainer.reward([ROWS[0]["prompt"]] * 2, [messages] * 2, kind=["neighbour"] * 2)
    assert len(found) == 2
    assert trainer.rollouts.state_dict() == before
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_policy_starts_from_another_run_of_the_same_shape_only(tmp_path):
    start = tmp_path / "start"
    first = make("grpo", tmp_path / "first", save_strategy="no")
    for parameter in first.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    first.model.save_pretrained(start / "adapter")
    (start / "manifest.json").write_text(json.dumps({"kind": "run", "status": "finished"}))
    second = make("grpo", tmp_path / "second", start_from=str(start), save_strategy="no")
    for name, parameter in first.model.named_parameters():
        assert torch.equal(second.model.get_parameter(name), parameter), name
    config = json.loads((start / "adapter/adapter_config.json").read_text())
    (start / "adapter/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    with pytest.raises(UserError, match="another shape or scale"):
        make("grpo", tmp_path / "third", start_from=str(start))


def test_completions_that_all_run_out_can_be_masked(tmp_path):
    trainer = make("grpo", tmp_path, mask_truncated_completions=True, max_steps=2, save_strategy="no",
                   max_completion_length=1)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2


def test_several_devices_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(OnlineGRPOConfig, "n_gpu", 2)
    with pytest.raises(UserError, match=r"on one device; there are 2(.|\n)*CUDA_VISIBLE_DEVICES"):
        make("grpo", tmp_path)
