"""The whole job of a recipe script: train, audit, merge, audit what will be served. The same functions as the verbs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from align_unlearn.errors import UserError


def main(default: Path, arguments: Sequence[str]) -> None:
    """Runs a recipe script's command line. Exit code 1: a gate failed, or the merge was refused; 2: a mistake.

    Args:
        default: the recipe where none is named.
        arguments: `[RECIPE.yaml] [--key value …]`.
    """
    words = list(arguments)
    recipe = Path(words.pop(0)) if words and words[0].endswith((".yaml", ".yml")) else default
    try:
        passed = whole_job(recipe, words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    raise SystemExit(0 if passed else 1)


def whole_job(recipe: Path, overrides: Sequence[str] = ()) -> bool:
    """Trains, audits the adapter, merges it to `RUN/merged` and audits the merged folder. Prints tables and pages.

    Returns:
        Whether adapter and merged model passed every gate.
    """
    from align_unlearn import load_recipe, merge, run_audit, train, write_report
    from align_unlearn.audit.run import check_gates
    from align_unlearn.report.curves import write_curves
    from align_unlearn.rewards.load import judge_spec, make_reward

    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {line}", flush=True)

    loaded = load_recipe(recipe, overrides)
    check_gates(loaded.job)
    trust = bool(loaded.args.trust_remote_code)
    judged_by = judge_spec(loaded.job.audit_judge, loaded.model.model_name_or_path)
    run = train(loaded, say)
    if curves := write_curves(run.path):
        say(f"learning curves: {curves}")
    judge = None if judged_by is None else make_reward(judged_by)  # not before: it takes memory
    adapter = run_audit(run.path, judge=judge, trust_remote_code=trust, say=say)
    print(adapter.table())
    say(f"report: {write_report(adapter.folder)}")
    folder = run.path / "merged"
    if not (folder / "manifest.json").is_file():
        merge(run.path, folder, trust_remote_code=trust, say=say)
    served = run_audit(folder, judge=judge, trust_remote_code=trust, say=say)
    print(served.table())
    say(f"report of the merged model: {write_report(served.folder)}")
    passed: bool = adapter.passed and served.passed
    say("every gate passed, merged too" if passed else "NOT every gate passed: see the report")
    return passed
