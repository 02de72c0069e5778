"""The verbs as a person types them."""

import json
import subprocess
import sys

import pytest
from conftest import make_model, run_script

from align_unlearn.doctor import checks

CLI = "-m", "align_unlearn.cli"


def cli(*words):
    """In a process of its own."""
    return subprocess.run([sys.executable, *CLI, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", ["train", "audit", "merge", "survive", "report", "doctor", "data", "models", "reward"])
def test_every_verb_has_help(verb):
    done = cli(verb, "--help")
    assert done.returncode == 0
    assert len(done.stdout) > 80


def test_a_mistake_is_one_screen_without_a_traceback(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objectiv: npo\n")
    cases = {
        "objective": ("train", recipe),
        "gates: forget.leak": (
            "train",
            "recipes/quickstart.yaml",
            "--output_dir",
            tmp_path / "run",
            "--gates",
            '{"forget.leak": "about 0"}',
        ),
        "--base NAME": ("audit", tmp_path),
        "did you mean standard": ("audit", tmp_path, "--suite", "standrad"),
        "did you mean privacy": ("audit", tmp_path, "--gates", "privcy"),
        "run folder": ("merge", tmp_path, "--to", tmp_path / "x"),
        "is not rounded": ("merge", tmp_path, "--to", tmp_path / "x", "--unchecked", "--precision", "nf4"),
        "no audit": ("report", tmp_path),
        "smollm2-135m": ("models", "fetch", "smollm"),
        "did you mean keywords": ("reward", "check", "keyword"),
        "not JSON": ("reward", "check", "keywords", "--kwargs", "{"),
    }
    for message, words in cases.items():
        done = run_script(*CLI, *words)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) < 12


def test_preview_marks_the_trained_tokens(tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {tiny}\nforget_dataset: builtin:chronicle@forget\n")
    done = run_script(*CLI, "data", "preview", recipe, "--rows", 2)
    assert done.returncode == 0, done.stderr
    assert "15 rows" in done.stdout
    assert "Thessaly" in done.stdout.replace("|", "")


def test_a_reward_is_checked_by_its_verb():
    """Exit code 0 where nothing speaks against it, 1 where something does."""
    for words, code, said in (
        (("refusal",), 0, "gibberish/answer"),
        (("keywords", "--kwargs", '{"words": ["zzz"]}'), 1, "every row the same score"),
    ):
        done = run_script(*CLI, "reward", "check", *words)
        assert done.returncode == code
        assert said in done.stdout


def test_the_rewards_of_a_recipe_are_checked_without_a_policy(tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = {"model_name_or_path": str(tmp_path / "base"), "rewards": {"fluent": {"model": "fluency"}, "refusal": {}}}
    (tmp_path / "online.yaml").write_text(json.dumps(recipe))
    done = run_script(*CLI, "reward", "check", tmp_path / "online.yaml")
    assert done.returncode in (0, 1), "a random model finds gibberish fluent"
    said = done.stdout
    assert said.index("fluent") < said.index("refusal")
    assert said.count("ms a row") == 2


def test_models_list():
    assert "smollm2-135m" in json.loads(cli("models", "list").stdout)


def test_doctor_does_what_it_says():
    found = {check.name: check for check in checks()}
    assert found["4-bit"].passed
    assert "relative error 0.0" in found["4-bit"].detail
    assert {"libraries", "GPU", "disk", "cache"} <= set(found)
