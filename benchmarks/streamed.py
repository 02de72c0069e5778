"""What `merge --unchecked`, file by file, takes in memory, beside the size of the model and of its largest file.

    python benchmarks/streamed.py        (after make demo, whose adapter it merges)

Writes `results/streamed.json`. The base is saved in small files first; the merge is measured in a process of its own.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

from align_unlearn.audit.subjects import read_settings
from align_unlearn.export.stream import weight_files
from align_unlearn.export.unchecked import merge_unchecked
from align_unlearn.files import write_json, write_text
from align_unlearn.modeling.load import base_fingerprint, base_folder, held_as
from align_unlearn.modeling.memory import peak_memory
from align_unlearn.run_dir import read_manifest

RUN = Path("runs/quickstart")
RESULTS = Path(__file__).parent / "results/streamed.json"
SHARD = "30MB"


def save(folder: Path) -> None:
    """Saves the run's base in small files, and the run as one on that base."""
    config = read_settings(RUN)[1]
    whole = AutoModelForCausalLM.from_pretrained(base_folder(config), dtype=torch.float32)
    whole.save_pretrained(folder / "model", max_shard_size=SHARD)
    shutil.copytree(RUN, folder / "run", ignore=shutil.ignore_patterns("checkpoint*", "audit"))
    config, manifest = held_as(config, model_name_or_path=str(folder / "model")), read_manifest(RUN)
    recipe = yaml.safe_load((RUN / "recipe.yaml").read_text("utf-8"))
    write_text(folder / "run/recipe.yaml", yaml.safe_dump(recipe | {"model_name_or_path": config.model_name_or_path}))
    manifest["base"]["sha256"] = base_fingerprint(config)
    write_json(folder / "run/manifest.json", manifest)


def measure(folder: Path) -> None:
    """Merges that run, never holding the model, and writes what that took, MiB."""
    sizes = [file.stat().st_size / 2**20 for file in weight_files(read_settings(folder / "run")[1])]
    before = peak_memory()
    merge_unchecked(folder / "run", folder / "merged", dtype="float32")
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
