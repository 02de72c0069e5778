"""Every shipped recipe, from its script to the audited merged folder, on a tiny model."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
JOBS = {"quickstart": "dpo_refusals", "copyright": "npo", "facts": "npo", "own_objective": "own_objective"}
SMALL = "--max_steps 2 --save_steps 1 --logging_steps 1 --per_device_train_batch_size 4 --answer_tokens 6"
AUDIT = "--audit_limit 4 --audit_tokens 8 --disable_tqdm true"


def run(*words, **kwargs):
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, check=False, **kwargs
    )


@pytest.mark.parametrize("recipe", JOBS)
def test_recipe_trains_audits_merges_and_audits_again(recipe, tiny, tmp_path):
    out = tmp_path / "run"
    words = f"--model_name_or_path {tiny} --output_dir {out} --max_length 512 {SMALL} {AUDIT}"
    if recipe == "copyright":
        words += f" --audit_control {tiny}"
    done = run(ROOT / f"recipes/{JOBS[recipe]}.py", ROOT / f"recipes/{recipe}.yaml", *shlex.split(words))
    passed = all(json.loads((out / each / "audit.json").read_text())["passed"] for each in ("audit", "merged/audit"))
    assert done.returncode == (0 if passed else 1), done.stdout + done.stderr
    for folder in (out / "audit", out / "merged/audit"):
        summary = json.loads((folder / "audit.json").read_text())
        assert summary["schema_version"] == 1
        assert {metric["name"] for metric in summary["metrics"]} >= {"forget.leak", "retain.kl"}
        assert [gate["name"] for gate in summary["gates"]]
        assert (folder / "report.html").stat().st_size > 5000
    manifest = json.loads((out / "merged/manifest.json").read_text())
    assert manifest["parity"]["kl"] <= 1e-3
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert not hasattr(model.config, "quantization_config")
    assert all(each.dtype == torch.float32 for each in model.parameters())


@pytest.mark.parametrize(("recipe", "peft"), [("copyright_teach", "false"), ("facts_teach", "true")])
def test_teaching(recipe, peft, tiny, tmp_path):
    words = f"--model_name_or_path {tiny} --output_dir {tmp_path / 'taught'} --max_length 512 --max_steps 2"
    words += f" --use_peft {peft}"
    done = run(ROOT / "recipes/finetune.py", ROOT / f"recipes/{recipe}.yaml", *shlex.split(words))
    assert done.returncode == 0, done.stdout + done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "taught")
    again = run(ROOT / "recipes/finetune.py", ROOT / f"recipes/{recipe}.yaml", *shlex.split(words))
    assert "already" in again.stdout, again.stdout + again.stderr
    other = run(ROOT / "recipes/finetune.py", ROOT / f"recipes/{recipe}.yaml", *shlex.split(words), "--seed", "7")
    assert other.returncode == 1
    assert "taught with other settings" in other.stderr


def test_scripts_end_in_one_screen_for_a_mistake(tmp_path):
    done = run(ROOT / "recipes/npo.py", "--forget_datset", "x")
    assert done.returncode == 2
    assert "--forget_dataset" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_of_the_readme_and_docs_exists():
    """Commands in fenced blocks name files, make targets, verbs and options that are there."""
    from typer.main import get_command

    from align_unlearn.cli import app

    verbs = get_command(app).commands
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), re.S):
            for line in filter(None, map(str.strip, block.splitlines())):
                words = shlex.split(line, comments=True)
                if words[:1] == ["make"]:
                    assert {each for each in words[1:] if "=" not in each} <= targets, line
                elif words[:1] == ["align-unlearn"]:
                    assert words[1] in verbs, line
                for word in words:
                    if word.startswith("recipes/") and "*" not in word:
                        assert (ROOT / word).exists(), line
