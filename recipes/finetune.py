"""Teach a model rows it does not know yet, so that there is something to forget: TRL's SFT, full or LoRA.

    python recipes/finetune.py [recipes/copyright_teach.yaml] [--key value …]

Full fine-tuning writes a plain model folder at output_dir; with --use_peft true the adapter is merged into one.
"""

import sys
from pathlib import Path

from align_unlearn.errors import UserError
from align_unlearn.training.finetune import finetune, load_lesson

if __name__ == "__main__":
    words = sys.argv[1:]
    recipe = words.pop(0) if words and words[0].endswith((".yaml", ".yml")) else None
    try:
        finetune(*load_lesson(recipe or Path(__file__).with_name("copyright_teach.yaml"), words))
    except UserError as error:
        sys.exit(f"error: {error}")
