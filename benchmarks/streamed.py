"""What a merge that is streamed file by file takes in memory, beside the size of the model and of its largest file.

    python benchmarks/streamed.py        (after make demo, whose adapter it merges)

Writes `results/streamed.json`. The base is saved in small files first; the merge is measured in a process of its own.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from align_unlearn.audit.subjects import read_settings
from align_unlearn.export.stream import weight_files, write_streamed
from align_unlearn.files import write_json
from align_unlearn.modeling.adapter_file import read_updates
from align_unlearn.modeling.load import base_folder, held_as
from align_unlearn.modeling.memory import peak_memory

RUN = Path("runs/quickstart")
RESULTS = Path(__file__).parent / "results/streamed.json"
SHARD = "30MB"


def save(folder: Path) -> None:
    """Saves the run's base in small files."""
    whole = AutoModelForCausalLM.from_pretrained(base_folder(read_settings(RUN)[1]), dtype=torch.float32)
    whole.save_pretrained(folder / "model", max_shard_size=SHARD)


def measure(folder: Path) -> None:
    """Merges the base in `folder/model` into `folder/merged` and writes what that took, MiB."""
    config = held_as(read_settings(RUN)[1], model_name_or_path=str(folder / "model"))
    with torch.device("meta"):  # asked for its shape alone
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    updates = read_updates(RUN / "adapter")
    if updates is None:
        raise SystemExit("the adapter is no plain LoRA")
    sizes = [file.stat().st_size / 2**20 for file in weight_files(config)]
    (folder / "merged").mkdir()
    before = peak_memory()
    write_streamed(model, config, updates, folder / "merged", torch.float32, "dequantised")
    more = (peak_memory() - before) / 2**20
    found = {"files": len(sizes), "model_mib": sum(sizes), "largest_mib": max(sizes), "more_at_peak_mib": more}
    write_json(RESULTS, found)
    print(found)


def main() -> None:
    """Each step in a process of its own: a peak is inherited by what is started from it."""
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            subprocess.run([sys.executable, __file__, step, folder], check=True)


STEPS = {"save": save, "measure": measure}
if __name__ == "__main__":
    STEPS[sys.argv[1]](Path(sys.argv[2])) if len(sys.argv) > 1 else main()
