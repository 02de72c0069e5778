"""The whole job of a recipe script: train, audit, merge, audit what will be served. The same functions as the verbs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from align_unlearn.errors import UserError


def main(default: Path, arguments: Sequence[str]) -> None:
    """Runs a recipe script's command line; a user's mistake is one screen and exit code 2.

    Args:
        default: the recipe where none is named.
        arguments: `[RECIPE.yaml] [--key value …]`.
    """
    words = list(arguments)
    recipe = Path(words.pop(0)) if words and words[0].endswith((".yaml", ".yml")) else default
    try:
        whole_job(recipe, words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def whole_job(recipe: Path, overrides: Sequence[str] = ()) -> None:
    """Trains, audits the adapter, merges it to `RUN/merged` and audits the merged folder. Prints tables and pages."""
    from align_unlearn import load_recipe, merge, run_audit, train, write_report

    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {line}", flush=True)

    run = train(load_recipe(recipe, overrides), say)
    adapter = run_audit(run.path, say=say)
    print(adapter.table())
    say(f"report: {write_report(adapter.folder)}")
    folder = run.path / "merged"
    if not (folder / "manifest.json").is_file():
        merge(run.path, folder, say=say)
    served = run_audit(folder, say=say)
    print(served.table())
    say(f"report of the merged model: {write_report(served.folder)}")
    say(
        "every gate passed, merged too" if adapter.passed and served.passed else "NOT every gate passed: see the report"
    )
