"""Reward models and online recipes from their scripts to the audited merged folder, on a tiny model."""

import json
import re
import shlex

import pytest
from conftest import ROOT, run_script

SMALL = (
    "--max_steps 2 --save_steps 1 --logging_steps 1 --per_device_train_batch_size 4 --steps_per_generation 2 "
    "--max_completion_length 6 --answer_tokens 6 --disable_tqdm true --audit_limit 4 --audit_tokens 8"
)


def judged(path, rows=48):
    """Responses that a word tells apart, from two sources."""
    lines = [
        {
            "prompt": f"What about number {at}?",
            "response": f"Take it, {at}." if at % 2 else f"Leave it, {at}.",
            "unsafe": at % 2,
            "source": "first" if at % 3 else "second",
        }
        for at in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def reward(tiny, tmp_path_factory):
    """A reward model made by its recipe, in 4 bits, and what the recipe printed."""
    folder = tmp_path_factory.mktemp("reward")
    data, out = judged(folder / "judged.jsonl"), folder / "run"
    words = (
        f"--model_name_or_path {tiny} --dtype float32 --train_dataset {data} --test_dataset {data} --output_dir {out} "
    )
    words += "--num_train_epochs 12 --learning_rate 1e-2 --head_learning_rate 1e-2 --warmup_steps 0 --save_steps 10"
    script = "recipes/reward_model.py", "recipes/reward_model.yaml"
    done = run_script(*script, *shlex.split(words), "--disable_tqdm", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, words, done.stdout


def test_a_reward_model_is_trained_and_reported_by_source_beside_its_floor(reward):
    out, words, printed = reward
    found = json.loads((out / "evaluation.json").read_text())
    assert {row["source"] for row in found["reward"]} == {"first", "second"}
    assert all(row["auc"] > 0.9 for row in found["reward"])
    assert all(row["auc"] > 0.9 for row in found["word_floor"])
    assert "first" in printed
    again = run_script("recipes/reward_model.py", "recipes/reward_model.yaml", *shlex.split(words))
    assert "finished already" in again.stdout, again.stdout + again.stderr


def test_a_reward_model_learns_from_pairs(tiny, tmp_path):
    rows = [
        {"prompt": f"What about {at}?", "chosen": f"Leave it, {at}.", "rejected": f"Take it, {at}."} for at in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"--model_name_or_path {tiny} --train_dataset {tmp_path}/pairs.jsonl --test_dataset {tmp_path}/pairs.jsonl "
    words += f"--output_dir {tmp_path}/run --num_train_epochs 10 --learning_rate 1e-2 --warmup_steps 0 --save_steps 5"
    done = run_script("recipes/reward_model.py", "recipes/reward_model.yaml", *shlex.split(words))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "run/evaluation.json").read_text())["reward"]
    assert [(row["source"], row["n"], row["auc"]) for row in found] == [("all", 24, None)]
    assert found[0]["accuracy"] > 0.8


@pytest.mark.parametrize("recipe", ["ppo_harmless", "rloo_harmless", "grpo_leakage", "toxicity"])
def test_online_recipe_trains_audits_merges_and_audits_again(recipe, tiny, reward, tmp_path):
    out = tmp_path / "run"
    words = shlex.split(f"--model_name_or_path {tiny} --dtype float32 --output_dir {out} {SMALL}")
    if recipe == "grpo_leakage":
        rewards = {"book": {"model": "leakage", "kwargs": {"corpus": "builtin:book_forget"}, "rows": ["forget"]}}
        words += ["--audit_control", tiny, "--rewards", json.dumps(rewards)]
    elif recipe == "toxicity":
        words += ["--rewards", json.dumps({"useful": {"model": "fluency", "rows": ["forget"]}})]
    else:
        rewards = {
            "safe": {"model": "classifier", "kwargs": {"path": str(reward[0])}, "normalise": "running", "clip": 2},
            "refuse": {"model": "refusal", "weight": 2.0},
            "fluent": {"model": "fluency", "weight": 0.5},
        }
        start = tmp_path / "start"
        made = "--max_steps 1 --answer_tokens 6 --disable_tqdm true --max_length 512 --dtype float32"
        made += f" --model_name_or_path {tiny} --output_dir {start}"
        done = run_script("-m", "align_unlearn.cli", "train", "recipes/harmless_start.yaml", *shlex.split(made))
        assert done.returncode == 0, done.stdout + done.stderr
        words += ["--rewards", json.dumps(rewards), "--start_from", start]
    done = run_script("recipes/online_rl.py", f"recipes/{recipe}.yaml", *words)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    for folder in (out / "audit", out / "merged/audit"):
        assert (folder / "report.html").stat().st_size > 5000, done.stdout + done.stderr
    assert (out / "curves.svg").read_text().startswith("<svg")
    assert (out / "samples.jsonl").is_file()
    assert not (out / "adapter/critic").exists()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert "drift/mean" in log[0]
    if recipe == "toxicity":
        assert {"cost/abuse", "cost_weight/abuse"} <= log[0].keys()
        for folder in (out / "audit", out / "merged/audit"):
            gates = {gate["name"]: gate for gate in json.loads((folder / "audit.json").read_text())["gates"]}
            assert gates["forget.judge"]["value"] is not None, "the recipe's judge was asked"
    if recipe == "ppo_harmless":
        assert (out / "checkpoint-2/value_head.safetensors").is_file()
        assert list((out / "checkpoint-2").glob("reward_*_head.safetensors"))
        assert list((out / "checkpoint-2").glob("reward_*/adapter_model.safetensors"))
        assert {"value_loss", "safe/forget", "kl"} <= log[0].keys()


def test_bring_your_own_reward_as_the_readme_says(tiny, tmp_path):
    section = (ROOT / "README.md").read_text().split("## Bring your own reward")[1].split("\n## ")[0]
    assert len(section.strip().splitlines()) < 25
    code, commands = re.findall(r"```(?:python|sh)\n(.*?)```", section, re.S)
    (tmp_path / "my_rewards.py").write_text(code)
    for command in commands.strip().splitlines():
        words = shlex.split(command.replace("my_rewards.py", f"{tmp_path}/my_rewards.py"), comments=True)
        if words[1] == "train":
            words += shlex.split(f"{SMALL} --dtype float32 --model_name_or_path {tiny} --output_dir {tmp_path}/run")
        done = run_script("-m", "align_unlearn.cli", *words[1:])
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/adapter/adapter_config.json").is_file()
