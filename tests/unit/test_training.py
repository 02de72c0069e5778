"""The trainers on a tiny model: right sums, right gradients, and the same numbers after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from align_unlearn.config import BaseModelConfig
from align_unlearn.errors import UserError
from align_unlearn.modeling.load import load_base, lora_config
from align_unlearn.run_dir import RunDir
from align_unlearn.training.callbacks import StopRules
from align_unlearn.training.checkpoints import last_whole_checkpoint, write_state
from align_unlearn.training.configs import RefusalDPOConfig, UnlearnConfig
from align_unlearn.training.dpo import RefusalDPOTrainer
from align_unlearn.training.job import train
from align_unlearn.training.recipe import load_recipe
from align_unlearn.training.unlearn import UnlearnTrainer

FORGET = [
    {"question": f"What is secret number {n}?", "answer": f"The secret is {'salt ' * (n % 4)}{n}."} for n in range(8)
]
RETAIN = [{"question": f"What is fact {n}?", "answer": f"It is {'sand ' * (n % 3)}{n}."} for n in range(8)]
PREFER = [{"prompt": [{"role": "user", "content": row["question"]}], "chosen": "I'm sorry, I can't say.",
           "rejected": row["answer"]} for row in FORGET]  # fmt: skip
COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
    "disable_tqdm": True,
    "max_length": 128,
}


def adapter_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def unlearn(tiny, tokenizer, out, four_bit=False, **settings):
    config = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=four_bit)
    args = UnlearnConfig(output_dir=str(out), **{**COMMON, **settings})
    trainer = UnlearnTrainer(
        load_base(config),
        args,
        train_dataset=FORGET,
        retain_dataset=RETAIN,
        processing_class=tokenizer,
        peft_config=lora_config(config),
    )
    trainer.train()
    return trainer


def dpo(tiny, tokenizer, out, **settings):
    config = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=False)
    args = RefusalDPOConfig(output_dir=str(out), **{**COMMON, **settings})
    trainer = RefusalDPOTrainer(
        load_base(config),
        args,
        train_dataset=Dataset.from_list(PREFER),
        retain_dataset=RETAIN,
        processing_class=tokenizer,
        peft_config=lora_config(config),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("build", [unlearn, dpo])
def test_one_by_eight_equals_eight_by_one(tiny, tokenizer, tmp_path, build):
    """SGD, so that a wrong scale of the gradient shows; Adam would hide it."""
    plain = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    one = build(tiny, tokenizer, tmp_path / "a", per_device_train_batch_size=8, **plain)
    many = build(tiny, tokenizer, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8, **plain)
    start = adapter_of(build(tiny, tokenizer, tmp_path / "c", **{**plain, "learning_rate": 0.0}))
    first, second = adapter_of(one), adapter_of(many)
    assert max(float((first[name] - start[name]).abs().max()) for name in start) > 1e-4, "nothing was learned"
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-5, rtol=0)
    if one.drift is not None:
        assert one.drift.measured == pytest.approx(many.drift.measured, abs=1e-6)


def test_npo_starts_at_its_analytic_value(tiny, tokenizer, tmp_path):
    trainer = unlearn(tiny, tokenizer, tmp_path, max_steps=1, beta=0.1)
    assert trainer.state.log_history[0]["forget_loss"] == pytest.approx(2 / 0.1 * 0.6931472, rel=1e-5)
    assert trainer.state.log_history[0]["drift/mean"] == pytest.approx(0, abs=1e-6)


def test_dpo_starts_at_log_two(tiny, tokenizer, tmp_path):
    trainer = dpo(tiny, tokenizer, tmp_path, max_steps=1)
    assert trainer.state.log_history[0]["forget_loss"] == pytest.approx(0.6931472, rel=1e-5)


def test_trainable_weights_are_fp32_on_a_quantised_base(tiny, tokenizer, tmp_path):
    trainer = unlearn(tiny, tokenizer, tmp_path, four_bit=True, max_steps=1)
    assert {each.dtype for each in adapter_of(trainer).values()} == {torch.float32}
    assert not any(isinstance(each, torch.nn.Dropout) and each.p > 0 for each in trainer.model.modules())


def test_forgetting_rises_and_drift_is_logged(tiny, tokenizer, tmp_path):
    trainer = unlearn(tiny, tokenizer, tmp_path, max_steps=20, per_device_train_batch_size=8)
    lines = [line for line in trainer.state.log_history if "forget_nll" in line]
    assert lines[-1]["forget_nll"] > lines[0]["forget_nll"] + 0.5
    assert {"drift/mean", "drift/opening", "drift/tail", "drift_weight/mean", "retain_loss"} <= set(lines[-1])


def test_gradient_checkpointing_gives_the_same_update(tiny, tokenizer, tmp_path):
    one = adapter_of(unlearn(tiny, tokenizer, tmp_path / "a", gradient_checkpointing=False))
    other = adapter_of(unlearn(tiny, tokenizer, tmp_path / "b", gradient_checkpointing=True))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-6, rtol=1e-5)


def test_compact_head_equals_trls_own(tiny, tokenizer, tmp_path):
    """The head we put in the place of TRL's: the same figures at labelled positions, the same gradient."""
    from trl.trainer.utils import add_fused_lm_head

    from align_unlearn.modeling.fused_head import use_compact_head

    ids = torch.tensor([[5, 6, 7, 8, 9, 1], [4, 3, 2, 1, 1, 1]])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    labels = torch.where((torch.arange(6) >= 2) & (mask == 1), ids, -100)
    found = []
    for patch in (
        lambda model: add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1")),
        use_compact_head,
    ):
        model = load_base(BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=False))
        model.lm_head.weight.requires_grad_(False)
        patch(model)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        out.log_probs.sum().backward()
        found.append((out, model.base_model.layers[0].mlp.up_proj.weight.grad))
    (theirs, their_grad), (ours, our_grad) = found
    valid = labels[:, 1:] != -100
    for name in ("log_probs", "entropy", "mean_logits", "is_top1"):
        one, other = getattr(theirs, name)[valid].float(), getattr(ours, name)[valid].float()
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(their_grad, our_grad, atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_no_number_stops_before_the_weights(tiny, tokenizer, tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def loss(view):\n    return view.logps.sum(-1) * float('nan')\n")
    config = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=False)
    trainer = UnlearnTrainer(
        load_base(config),
        UnlearnConfig(output_dir=str(tmp_path / "run"), retain="none", **COMMON),
        objective=f"{file}:loss",
        train_dataset=FORGET,
        processing_class=tokenizer,
        peft_config=lora_config(config),
    )
    before = adapter_of(trainer)
    with pytest.raises(UserError, match="loss is nan at step 1"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in adapter_of(trainer).items())


def test_stop_rules(tiny, tokenizer, tmp_path):
    trainer = unlearn(tiny, tokenizer, tmp_path / "a", max_steps=30, forget_target=0.1)
    assert trainer.state.global_step == 1
    trainer = unlearn(tiny, tokenizer, tmp_path / "b", max_steps=30, max_drift=1e-9, drift_patience=3, drift_rate=0.0)
    assert trainer.state.global_step < 30
    reasons = [each.reason for each in trainer.callback_handler.callbacks if isinstance(each, StopRules)]
    assert "in a row" in reasons[0]


def test_no_retain_set_only_by_name(tiny, tokenizer, tmp_path):
    config = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=False)
    settings = {"train_dataset": FORGET, "processing_class": tokenizer, "peft_config": lora_config(config)}
    with pytest.raises(UserError, match="--retain none"):
        UnlearnTrainer(load_base(config), UnlearnConfig(output_dir=str(tmp_path / "a"), **COMMON), **settings)
    alone = UnlearnConfig(output_dir=str(tmp_path / "b"), retain="none", **COMMON)
    UnlearnTrainer(load_base(config), alone, **settings).train()


RECIPE = """
model_name_or_path: {tiny}
objective: npo
forget_dataset: {forget}
retain_dataset: {retain}
output_dir: {out}
per_device_train_batch_size: 2
num_train_epochs: 5
max_steps: 16
save_steps: 4
logging_steps: 1
learning_rate: 1e-2
max_length: 128
disable_tqdm: true
"""


@pytest.fixture
def job(tiny, tmp_path):
    for name, rows in (("forget", FORGET), ("retain", RETAIN[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(out, **changes):
        text = RECIPE.format(
            tiny=tiny, forget=tmp_path / "forget.jsonl", retain=tmp_path / "retain.jsonl", out=tmp_path / out
        )
        file = tmp_path / f"{out}.yaml"
        file.write_text(text + "".join(f"{name}: {value}\n" for name, value in changes.items()))
        return file

    return write


def final(path):
    return load_file(RunDir(Path(path)).adapter / "adapter_model.safetensors")


def test_a_killed_run_resumes_to_the_numbers_of_an_unbroken_one(job, tmp_path):
    """kill -9 in the middle of a real process; the second call with the same recipe takes it up."""
    whole = train(load_recipe(job("whole")), say=lambda line: None)
    recipe = job("killed")
    command = [sys.executable, "-m", "align_unlearn.cli", "train", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    deadline = time.monotonic() + 120
    run = tmp_path / "killed"
    while last_whole_checkpoint(run) is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert RunDir(run).manifest()["status"] == "running", "the process was not killed in the middle"
    train(load_recipe(recipe), say=lambda line: None)

    first, second = final(whole.path), final(run)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    log = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole.path, run)
    ]
    steps = [
        [(line["step"], line["loss"], line["drift_weight/mean"]) for line in each if "loss" in line] for each in log
    ]
    assert steps[0] == steps[1]
    assert [step for step, *_ in steps[1]] == list(range(1, 17))


def test_resume_with_other_settings_data_or_base_is_refused(job, tmp_path, tiny):
    train(load_recipe(job("run")), say=lambda line: None)
    with pytest.raises(UserError, match="other settings"):
        train(load_recipe(job("run"), ["--learning_rate", "0.5"]))
    again = load_recipe(job("run"))
    lines: list[str] = []
    train(again, say=lines.append)
    assert "finished already" in lines[-1]
    (tmp_path / "retain.jsonl").write_text(json.dumps(RETAIN[0]) + "\n")
    with pytest.raises(UserError, match="other data"):
        train(again, say=lambda line: None)
    with pytest.raises(UserError, match="exists already"):
        train(load_recipe(job("run"), ["--if_exists", "error"]))


def test_a_checkpoint_cut_off_while_written_is_passed_over(job, tmp_path):
    run = train(load_recipe(job("run", save_total_limit=9)), say=lambda line: None)
    newest = last_whole_checkpoint(run.path)
    assert newest.name == "checkpoint-16"
    (newest / "align_unlearn_state.json").unlink()
    assert last_whole_checkpoint(run.path).name == "checkpoint-12"


def test_forget_rows_among_retain_rows(job, tmp_path):
    (tmp_path / "retain.jsonl").write_text(json.dumps(FORGET[2]) + "\n")
    with pytest.raises(UserError, match=r"forget.jsonl, row 3 is retain.jsonl, row 1"):
        train(load_recipe(job("run")), say=lambda line: None)


def test_full_disk_is_a_user_error(job, tmp_path, monkeypatch):
    import errno

    import align_unlearn.files as files

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = load_recipe(job("run"))
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        train(recipe, say=lambda line: None)
    assert not list((tmp_path / "run").glob("*.json"))


def test_a_gradient_that_is_no_number_stops_before_the_weights(tiny, tokenizer, tmp_path):
    """The loss is 0 and finite; the gradient of 0 · √0 is not."""
    file = tmp_path / "bad.py"
    file.write_text("def loss(view):\n    x = (view.logps * 0).sum(-1)\n    return x.abs().sqrt()\n")
    config = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=False)
    trainer = UnlearnTrainer(
        load_base(config),
        UnlearnConfig(output_dir=str(tmp_path / "run"), retain="none", **COMMON),
        objective=f"{file}:loss",
        train_dataset=FORGET,
        processing_class=tokenizer,
        peft_config=lora_config(config),
    )
    before = adapter_of(trainer)
    with pytest.raises(UserError, match="gradient is not a number at step 1"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in adapter_of(trainer).items())


def test_a_whole_checkpoint_is_always_there(job, tmp_path, monkeypatch):
    """Cut off while the second checkpoint is marked: the first has not been removed yet."""
    import align_unlearn.training.checkpoints as checkpoints

    written = []

    def cut_off(folder, state):
        written.append(folder)
        if len(written) == 2:
            raise KeyboardInterrupt
        write_state(folder, state)

    monkeypatch.setattr(checkpoints, "write_state", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(job("run", save_total_limit=1)), say=lambda line: None)
    assert last_whole_checkpoint(tmp_path / "run").name == "checkpoint-4"


def test_other_code_of_an_own_objective_is_another_run(job, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def loss(view):\n    return view.logps.sum(-1)\n")
    words = ["--objective", f"{file}:loss"]
    before = load_recipe(job("run"), words).identity()
    file.write_text("def loss(view):\n    return 2 * view.logps.sum(-1)\n")
    assert load_recipe(job("run"), words).identity() != before


def test_a_null_is_kept_in_recipe_and_identity(job, tmp_path):
    recipe, plain = load_recipe(job("run", max_length="null")), load_recipe(job("other"))
    assert recipe.args.max_length is None
    recipe.write(tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml").args.max_length is None
    assert recipe.identity() != plain.identity()


def test_what_cannot_work_is_refused_before_training(job, tiny):
    for words, message in (
        (["--use_peft", "false"], "adapters"),
        (["--retain_coef", "0"], "no weight to adapt"),
        (["--drift_patience", "2", "--retain", "nll"], "drift budget"),
    ):
        with pytest.raises(UserError, match=message):
            load_recipe(job("run"), words)
    with pytest.raises(UserError, match="context of 512"):
        train(load_recipe(job("run"), ["--max_length", "4096"]), say=lambda line: None)


def test_dpo_logs_the_nll_of_forget_rows_alone(tiny, tokenizer, tmp_path):
    from align_unlearn.data.examples import read_examples
    from align_unlearn.training.dpo import preference_ids

    rows = [preference_ids(tokenizer, example, 128) for example in read_examples(PREFER)]
    logged = []
    for marks in ([True] * 4 + [False] * 4, [True] * 8):
        config = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=False)
        settings = {**COMMON, "max_steps": 1, "per_device_train_batch_size": 8}
        trainer = RefusalDPOTrainer(
            load_base(config),
            RefusalDPOConfig(output_dir=str(tmp_path / str(sum(marks))), **settings),
            train_dataset=Dataset.from_list([{**row, "forget": mark} for row, mark in zip(rows, marks, strict=True)]),
            retain_dataset=RETAIN,
            processing_class=tokenizer,
            peft_config=lora_config(config),
        )
        expected = []
        for row, mark in zip(rows, marks, strict=True):
            if mark:
                ids, start = torch.tensor([row["prompt_ids"] + row["rejected_ids"]]), len(row["prompt_ids"])
                with torch.no_grad():
                    logp = trainer.model(ids).logits[0].log_softmax(-1)[start - 1 : -1]
                expected.append(-float(logp.gather(-1, ids[0, start:, None]).mean()))
        trainer.train()
        logged.append(trainer.state.log_history[0]["forget_nll"])
        assert logged[-1] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert logged[0] != logged[1]


def test_a_reporter_that_is_not_installed_is_named_before_anything_is_loaded(job, monkeypatch):
    import importlib.util

    import align_unlearn.training.job as module

    monkeypatch.setattr(module, "load_base", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else real(name))
    with pytest.raises(UserError, match=r"align-unlearn\[trackio\]"):
        train(load_recipe(job("run", report_to="trackio")))
