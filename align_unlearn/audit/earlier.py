"""Requests that a model has answered before: those of the runs that lie beneath it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align_unlearn.audit.subjects import read_settings
from align_unlearn.config import Job
from align_unlearn.run_dir import is_run, read_manifest


def earlier_runs(target: str | Path) -> list[str]:
    """The runs or adapters beneath a run or in an export, oldest first; none for any other model."""
    place = Path(target)
    if not ((place / "recipe.yaml").is_file() and (place / "manifest.json").is_file()):
        return []
    config = read_settings(place)[1]
    return list(read_manifest(place).get("after", config.after) or [])


def requests_of(paths: Sequence[str | Path]) -> dict[str, Path | None]:
    """By a name of its own, the run that holds each path's request; none where an adapter lies in no run.

    An adapter without its run does not say what was to be forgotten.
    """
    found: dict[str, Path | None] = {}
    for path in map(Path, paths):
        run = next((each for each in (path, path.parent) if is_run(each)), None)
        name, at = (run or path).resolve().name, 2
        while name in found:
            name, at = f"{(run or path).resolve().name}-{at}", at + 1
        found[name] = run
    return found


def jobs_of(paths: Sequence[str | Path]) -> list[Job]:
    """The recipes of those runs among the paths."""
    return [read_settings(run)[0] for run in requests_of(paths).values() if run is not None]
