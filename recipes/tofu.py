"""TOFU from end to end: teach everything, teach what is kept alone, forget, and ask all three models everything.

    python recipes/tofu.py [recipes/tofu.yaml [recipes/tofu_teach.yaml]] [--objective NAME] [--key value …]

Forget quality is judged against the model that was taught only what is kept; both models are taught once, by the second
recipe, and found again by every later run.
"""

import sys
from pathlib import Path

from align_unlearn import UserError, evaluate_tofu, finetune, load_lesson, load_recipe, train

HERE = Path(__file__).parent


def main(words: list[str]) -> None:
    """Runs the recipe's command line."""
    recipes = [HERE / "tofu.yaml", HERE / "tofu_teach.yaml"]
    for at in range(2):
        if words and words[0].endswith((".yaml", ".yml")):
            recipes[at] = Path(words.pop(0))
    recipe = load_recipe(recipes[0], words)
    job, full = recipe.job, recipe.model.model_name_or_path
    for folder, sources in (
        (full, [job.forget_dataset, job.retain_dataset]),
        (job.audit_control, [job.retain_dataset]),
    ):
        if folder and not Path(folder).exists():
            finetune(*load_lesson(recipes[1], ["--datasets", *sources, "--output_dir", folder]))
    run = train(recipe)
    print(evaluate_tofu(run.path).table())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
