"""What a step of NPO with exact KL costs beside a plain supervised LoRA step on the same tokens, in one run.

    python benchmarks/steps.py           (make bench-steps)

Three trainers take turns on the same forget and retain rows, on the same kind of base: supervised (TRL's `SFTTrainer`
with LoRA, all rows in one batch, with the compact LM head of this project, which is faster than TRL's on a CPU), NPO
with nothing kept, and NPO with the original's log-probabilities and hidden states kept. Seconds are medians over steps
of all turns; the first two steps of a turn are left out. Beside them: what the kept states cost in seconds and on disk,
and how far the exact KL from them is from the one computed afresh. Writes `benchmarks/results/steps.json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTTrainer

from align_unlearn.data.batches import pad_rows
from align_unlearn.files import write_json
from align_unlearn.modeling.fused_head import use_compact_head
from align_unlearn.modeling.load import load_base, lora_config
from align_unlearn.modeling.tokenizer import load_tokenizer
from align_unlearn.objectives.view import CompletionView
from align_unlearn.training.finetune import LessonConfig
from align_unlearn.training.job import build_trainer
from align_unlearn.training.recipe import Recipe, load_recipe
from align_unlearn.training.ref_cache import with_ref_hidden
from align_unlearn.training.rows import read_job_data, text_rows

RESULT = Path(__file__).parent / "results/steps.json"
ROWS, TURNS, STEPS, WARM_UP = 4, 2, 5, 2
RECIPE = Path(__file__).parents[1] / "recipes/facts.yaml"
COMMON = f"--model_name_or_path smollm2-135m --save_strategy no --disable_tqdm true --max_steps {STEPS}"
LIMITS = {"npo": 1.8, "npo, kept": 1.35}


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the clock."""
        self.seconds.append(time.perf_counter() - self.began)


def recipe(folder: Path, kept: bool) -> Recipe:
    """The NPO job, with or without what is computed once."""
    words = f"{COMMON} --output_dir {folder} --per_device_train_batch_size {ROWS} --max_drift 0.05"
    return load_recipe(RECIPE, f"{words} --precompute_ref_log_probs {kept} --cache_ref_hidden {kept}".split())


def npo(kept: bool) -> Callable[[Path], Any]:
    """Makes the NPO trainer."""

    def make(folder: Path) -> Any:
        job = recipe(folder, kept)
        tokenizer = load_tokenizer(job.model.model_name_or_path)
        return build_trainer(job, read_job_data(job.job, tokenizer, retain_term=True), load_base(job.model), tokenizer)

    return make


def supervised(folder: Path) -> Any:
    """Makes the supervised trainer: forget and retain rows in one batch, as many tokens as NPO has."""
    job = recipe(folder, kept=False)
    tokenizer = load_tokenizer(job.model.model_name_or_path)
    forget, retain = text_rows(read_job_data(job.job, tokenizer, retain_term=True), tokenizer, 256)
    pairs = [row for pair in zip(forget, retain, strict=False) for row in pair]
    args = LessonConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2 * ROWS,
        save_strategy="no",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=load_base(job.model),
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=lora_config(job.model),
        data_collator=lambda batch: pad_rows(batch, tokenizer.pad_token_id),
    )
    use_compact_head(trainer.model)
    return trainer


TRAINERS: dict[str, Callable[[Path], Any]] = {"supervised": supervised, "npo": npo(False), "npo, kept": npo(True)}


def seconds_a_step() -> dict[str, list[float]]:
    """Seconds of every step that counts, by trainer."""
    found: dict[str, list[float]] = {name: [] for name in TRAINERS}
    for turn in range(TURNS):
        for name, make in TRAINERS.items():
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                trainer, clock = make(Path(folder)), Clock()
                trainer.add_callback(clock)
                trainer.train()
            found[name] += clock.seconds[WARM_UP:]
            print(f"turn {turn + 1}, {name}: {statistics.median(clock.seconds[WARM_UP:]):.2f} s a step", flush=True)
    return found


def kept_states() -> dict[str, float]:
    """What the hidden states on disk cost, and how far the KL from them is from the one computed afresh."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = npo(kept=False)(Path(folder))
        rows, model = trainer.train_dataset.retain, trainer.model
        began = time.perf_counter()
        with_hidden = with_ref_hidden(rows, model, Path(folder) / "cache", batch_size=ROWS)
        seconds = time.perf_counter() - began
        disk = (Path(folder) / "cache/ref_hidden.bin").stat().st_size
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        apart = []
        with torch.no_grad():
            for start in range(0, len(rows) - ROWS + 1, ROWS):
                afresh, kept = (
                    CompletionView(model, **pad_rows([each[at] for at in range(start, start + ROWS)], 0)).kl
                    for each in (rows, with_hidden)
                )
                apart.append(float((afresh - kept).abs().max() / afresh.mean()))
    positions = sum(label != -100 for labels in rows["labels"] for label in labels)
    return {
        "rows": len(rows),
        "seconds_once": round(seconds, 2),
        "disk_mib": round(disk / 2**20, 2),
        "logits_would_take_mib": round(positions * trainer.model.config.vocab_size * 4 / 2**20, 1),
        "largest_kl_difference_relative_to_its_mean": max(apart),
    }


def main() -> None:
    """Every trainer in turns; exit code 1 if a ratio is beyond its limit."""
    measured = seconds_a_step()
    medians = {name: statistics.median(each) for name, each in measured.items()}
    ratios = {name: round(medians[name] / medians["supervised"], 3) for name in LIMITS}
    result = {
        "base": "smollm2-135m, nf4+float32",
        "rows_a_step": {"forget": ROWS, "retain": ROWS},
        "seconds_a_step": {name: round(each, 3) for name, each in medians.items()},
        "spread": {name: [round(min(each), 3), round(max(each), 3)] for name, each in measured.items()},
        "ratio_to_supervised": ratios,
        "limits": LIMITS,
        "kept_states": kept_states(),
        "seconds_saved_a_step": round(medians["npo"] - medians["npo, kept"], 3),
    }
    write_json(RESULT, result)
    print(json.dumps(result, indent=2))
    sys.exit(any(ratios[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    main()
