"""TOFU from end to end: teach everything, teach what is kept alone, forget, and ask all three models everything.

    python recipes/tofu.py [recipes/tofu.yaml] [--objective NAME] [--key value …]

Forget quality is judged against the model that was taught only what is kept; both models are taught once (by
recipes/tofu_teach.yaml) and found again by every later run.
"""

import sys
from pathlib import Path

from align_unlearn import UserError, evaluate_tofu, finetune, load_lesson, load_recipe, train

LESSON = Path(__file__).with_name("tofu_teach.yaml")


def teach(folder: str, *sources: str) -> None:
    """Teaches the rows of `sources` to the model of the lesson and writes it to `folder`."""
    finetune(*load_lesson(LESSON, ["--datasets", *sources, "--output_dir", folder]))


def main(words: list[str]) -> None:
    """Runs the recipe's command line."""
    named = bool(words) and words[0].endswith((".yaml", ".yml"))
    recipe = load_recipe(words.pop(0) if named else Path(__file__).with_name("tofu.yaml"), words)
    job = recipe.job
    if not Path(recipe.model.model_name_or_path).exists():
        teach(recipe.model.model_name_or_path, job.forget_dataset, job.retain_dataset)
    if job.audit_control and not Path(job.audit_control).exists():
        teach(job.audit_control, job.retain_dataset)
    run = train(recipe)
    print(evaluate_tofu(run.path).table())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
