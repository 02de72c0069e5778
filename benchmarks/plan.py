"""What `plan` foresees against what a run takes: peak resident memory on a CPU, beside Python and the libraries.

    python benchmarks/plan.py            (make bench-plan)

Each case runs in a process of its own: a few steps of the real job, then the process's highest resident size, less its
size once everything was imported. Writes `benchmarks/results/plan.json`.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

RESULT = Path(__file__).parent / "results/plan.json"
COMMON = "--max_steps 3 --logging_steps 1 --save_strategy no --disable_tqdm true --if_exists overwrite"
CASES = {
    "smollm2-135m, NF4, npo, batches of 8": ("recipes/facts.yaml", "--model_name_or_path smollm2-135m", "npo", 8),
    "smollm2-135m, fp32, simnpo, batches of 16": (
        "recipes/facts.yaml",
        "--model_name_or_path smollm2-135m --load_in_4bit false --retain nll",
        "simnpo",
        16,
    ),
    "smollm2-135m, bf16, wga, batches of 4": (
        "recipes/facts.yaml",
        "--model_name_or_path smollm2-135m --load_in_4bit false --dtype bfloat16",
        "wga",
        4,
    ),
    "smollm2-135m, NF4, dpo, batches of 4": ("recipes/facts.yaml", "--model_name_or_path smollm2-135m", "dpo", 4),
    "wide Llama of 12 layers, NF4, npo, batches of 8": ("recipes/facts.yaml", "--model_name_or_path WIDE", "npo", 8),
}


def wide_model(folder: Path) -> Path:
    """A random Llama of another shape (12 layers, width 1024), with SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from align_unlearn import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(recipe: str, words: list[str]) -> dict[str, int]:
    """In a process of its own: plan, run, and the highest resident size beside the libraries."""
    import psutil

    from align_unlearn.training.job import train
    from align_unlearn.training.plan import plan
    from align_unlearn.training.recipe import load_recipe

    loaded = load_recipe(recipe, words)
    foreseen = plan(loaded).described()
    before = psutil.Process().memory_info().rss
    train(loaded, say=lambda line: None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"foreseen": foreseen["total"], "measured": peak - before, "libraries": before, **foreseen}


def main() -> None:
    """Every case; exit code 1 if one is off by more than a fifth."""
    rows = []
    with tempfile.TemporaryDirectory() as work:
        wide = wide_model(Path(work) / "wide")
        for name, (recipe, words, objective, size) in CASES.items():
            given = f"{words} {COMMON} --objective {objective} --per_device_train_batch_size {size}".split()
            given = [str(wide) if word == "WIDE" else word for word in [*given, "--output_dir", f"{work}/run"]]
            done = subprocess.run(
                [sys.executable, __file__, recipe, *given], stdout=subprocess.PIPE, text=True, check=True
            )
            row = {"case": name, **json.loads(done.stdout.splitlines()[-1])}
            row["ratio"] = row["foreseen"] / row["measured"]
            rows.append(row)
            print(f"{name}: foreseen {row['foreseen'] >> 20} MiB, measured {row['measured'] >> 20} MiB")
    RESULT.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    raise SystemExit(any(abs(row["ratio"] - 1) > 0.2 for row in rows))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], sys.argv[2:])))
    else:
        main()
