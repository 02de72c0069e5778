"""Every shipped recipe, from its script to the audited merged folder, on a tiny model."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script
from transformers import AutoModelForCausalLM

JOBS = {
    "quickstart": "dpo_refusals", "hallucination": "dpo_refusals", "copyright": "npo", "facts": "npo", "bias": "npo",
    "own_objective": "own_objective",
}  # fmt: skip
SMALL = "--max_steps 2 --save_steps 1 --logging_steps 1 --per_device_train_batch_size 4 --answer_tokens 6"
AUDIT = "--audit_limit 4 --audit_tokens 8 --disable_tqdm true"


@pytest.mark.parametrize("recipe", JOBS)
def test_recipe_trains_audits_merges_and_audits_again(recipe, tiny, tmp_path):
    out = tmp_path / "run"
    words = f"--model_name_or_path {tiny} --output_dir {out} --max_length 512 {SMALL} {AUDIT}"
    if recipe == "copyright":
        words += f" --audit_control {tiny}"
    if recipe == "facts":
        words += """ --audit_judge '{"the": {"model": "keywords", "kwargs": {"words": ["the"]}}}'"""
        words += """ --gates '{"forget.judge": "point <= 0"}'"""
    done = run_script(ROOT / f"recipes/{JOBS[recipe]}.py", ROOT / f"recipes/{recipe}.yaml", *shlex.split(words))
    passed = all(json.loads((out / each / "audit.json").read_text())["passed"] for each in ("audit", "merged/audit"))
    assert done.returncode == (0 if passed else 1), done.stdout + done.stderr
    for folder in (out / "audit", out / "merged/audit"):
        summary = json.loads((folder / "audit.json").read_text())
        assert summary["schema_version"] == 1
        assert {metric["name"] for metric in summary["metrics"]} >= {"forget.leak", "retain.kl"}
        assert [gate["name"] for gate in summary["gates"]]
        if recipe == "facts":
            assert summary["gates"][0]["passed"], "the recipe's judge was asked"
        assert (folder / "report.html").stat().st_size > 5000
    manifest = json.loads((out / "merged/manifest.json").read_text())
    assert manifest["parity"]["kl"] <= 1e-3
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert not hasattr(model.config, "quantization_config")
    assert all(each.dtype == torch.float32 for each in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "peft"), [("copyright_teach", "false"), ("facts_teach", "true"), ("toxicity_teach", "false")]
)
def test_teaching(recipe, peft, tiny, tmp_path):
    script = ROOT / "recipes/finetune.py", ROOT / f"recipes/{recipe}.yaml"
    words = f"--model_name_or_path {tiny} --output_dir {tmp_path / 'taught'} --max_length 512 --max_steps 2"
    words += f" --use_peft {peft}"
    done = run_script(*script, *shlex.split(words))
    assert done.returncode == 0, done.stdout + done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "taught")
    again = run_script(*script, *shlex.split(words))
    assert "already" in again.stdout, again.stdout + again.stderr
    other = run_script(*script, *shlex.split(words), "--seed", "7")
    assert other.returncode == 1
    assert "taught with other settings" in other.stderr


def test_tofu_teaches_both_models_forgets_and_asks_all_three(tiny, tmp_path):
    rows = [
        {"question": f"Who is {name}?", "answer": f"{name} is a poet.", "paraphrased_answer": f"A poet is {name}.",
         "perturbed_answer": [f"{name} is a cook.", f"{name} is a judge."]}
        for name in ("Ada", "Bo", "Cai", "Dag", "Eli", "Fay")
    ]  # fmt: skip
    data, lesson = tmp_path / "rows.json", tmp_path / "lesson.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lesson.write_text(f"model_name_or_path: {tiny}\nload_in_4bit: false\nuse_peft: false\nmax_steps: 2\n")
    sets = {"forget_dataset": "[:2]", "retain_dataset": "[2:]", "audit_retain": "[2:]", "audit_real_authors": "[3:]"}
    words = [word for name, kept in sets.items() for word in (f"--{name}", f"{data}@{kept}")]
    words += ["--audit_world_facts", data, "--model_name_or_path", tmp_path / "full"]
    words += ["--audit_control", tmp_path / "retained", "--output_dir", tmp_path / "run", "--dtype", "float32"]
    words += shlex.split("--max_steps 2 --save_steps 1 --audit_tokens 6 --disable_tqdm true")
    script = [ROOT / "recipes/tofu.py", ROOT / "recipes/tofu.yaml", lesson]
    done = run_script(*script, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "run/audit/tofu.json").read_text())
    assert found["rows"] == {"forget": 2, "retain": 4, "real_authors": 3, "world_facts": 6}
    assert set(found["models"]) == {"base", "candidate", "control"}
    assert found["models"]["control"]["forget_quality"] == pytest.approx(1.0)
    assert found["models"]["base"]["retain.kl"] == 0.0
    assert 0 <= found["models"]["candidate"]["forget.probability"] <= 1
    assert "forget_quality" in done.stdout


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (("--forget_datset", "x"), "--forget_dataset"),
        (("--gates", '{"forget.leek": "<= 0.1"}'), "did you mean forget.leak"),
    ],
)
def test_scripts_end_in_one_screen_for_a_mistake(mistake, said, tmp_path):
    """In a process of its own, as a person starts it; before anything is loaded."""
    words = [sys.executable, "recipes/npo.py", *mistake, "--model_name_or_path", "none", "--output_dir", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert said in done.stderr
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
