"""Recipes: YAML, then the command line; every mistake names the nearest valid word."""

import subprocess
import sys
from pathlib import Path

import pytest

from align_unlearn.config import BaseModelConfig
from align_unlearn.errors import UserError
from align_unlearn.training.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def write(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_command_line_goes_over_yaml(tmp_path):
    file = write(tmp_path, "objective: npo\nlearning_rate: 1e-5\nbeta: 0.2\nmax_steps: 7\n")
    recipe = load_recipe(file, ["--learning_rate", "3e-4", "--beta=0.5"])
    assert (recipe.args.learning_rate, recipe.args.beta, recipe.args.max_steps) == (3e-4, 0.5, 7)
    assert recipe.args.output_dir == "runs/recipe"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_can_be_read_and_written_and_read_again(file, tmp_path):
    if file.stem.endswith("_teach"):
        from align_unlearn.training.finetune import load_lesson

        lesson, _, _ = load_lesson(file)
        assert lesson.datasets
        return
    if file.stem == "reward_model":
        from align_unlearn.training.reward import load_reward_job

        job = load_reward_job(file)[0]
        assert job.limits == job.windows == (64, 192)
        return
    recipe = load_recipe(file)
    recipe.write(tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml").identity() == recipe.identity()


def test_unknown_keys_get_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match="forget_dataset"):
        load_recipe(write(tmp_path, "forget_datset: builtin:harmful\n"))
    with pytest.raises(UserError, match="--learning_rate"):
        load_recipe(None, ["--learning_rat", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective: npoo\n", "npo"),
        ("objective: npo\nobjective_kwargs: {betaa: 1}\n", "beta"),
        ("objective: npo\nretain: lk\n", "kl"),
        ("max_drift: -1\n", "negative"),
        ("extrapolate: 0\n", "above 0"),
        ("extrapolate: .nan\n", "above 0"),
        ("max_steps: many\n", "max_steps"),
        ("- a\n- b\n", "mapping"),
        ("a: [\n", "YAML"),
    ],
)
def test_mistakes_before_any_weight_is_loaded(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, text))


def test_recipe_that_is_missing_or_not_utf8(tmp_path):
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    file = tmp_path / "latin.yaml"
    file.write_bytes("objective: é\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        load_recipe(file)


def test_defaults_are_four_bit_lora_without_dropout():
    config = BaseModelConfig()
    assert (config.load_in_4bit, config.use_peft, config.lora_dropout) == (True, True, 0.0)
    assert config.lora_target_modules == "all-linear"
    assert BaseModelConfig(load_in_8bit=True).load_in_4bit is False


def test_nothing_heavy_is_imported_for_help_and_settings():
    code = (
        "import sys, align_unlearn, align_unlearn.cli, align_unlearn.config\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_telemetry_is_off():
    code = "import os, align_unlearn; assert os.environ['HF_HUB_DISABLE_TELEMETRY'] == '1'"
    subprocess.run([sys.executable, "-c", code], check=True)
