"""Train a reward model and say, source by source, how good it is and what counting words would have given.

    python recipes/reward_model.py [recipes/reward_model.yaml] --train_dataset FILE --test_dataset FILE [--key value …]

A policy is then trained against it with `rewards: {safe: {model: classifier, kwargs: {path: RUN}}}`.
"""

import sys
from pathlib import Path

from align_unlearn import UserError, load_reward_job, train_reward
from align_unlearn.data.exchange import read_judged
from align_unlearn.rewards.evaluate import report_reward


def main(words: list[str]) -> None:
    """Runs the recipe's command line."""
    given = words and words[0].endswith((".yaml", ".yml"))
    recipe = words.pop(0) if given else Path(__file__).with_name("reward_model.yaml")
    job, config, args = load_reward_job(recipe, words)
    run = train_reward(job, config, args)
    if job.test_dataset:
        print(report_reward(run.path, job.train_rows(), read_judged(job.test_dataset)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
