"""What was found once is not computed again: results by what made them, a line each, appended as they are made.

An audit that is killed takes up where it was, and one that asks more pays only for what is new. A line that a kill has
torn is dropped and its row asked again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from align_unlearn.files import disk_errors, sha256_of
from align_unlearn.modeling.embedded import cache_folder
from align_unlearn.modeling.generate import progress_bar


class Kept:
    """Results of one maker (a subject and the settings it worked under) by what it was given.

    Args:
        kind: of result: `answers`, `texts`.
        maker: what the results depend on beside the row, JSON-like.
    """

    def __init__(self, kind: str, maker: Any) -> None:
        self.path = cache_folder() / kind / f"{sha256_of(maker)}.jsonl"
        self.found: dict[str, Any] = {}
        if self.path.is_file():
            for line in self.path.read_text("utf-8", errors="replace").split("\n"):
                try:
                    known = json.loads(line)
                    self.found[known["key"]] = known["value"]
                except (ValueError, KeyError, TypeError):
                    continue

    def add(self, values: dict[str, Any]) -> None:
        """Keeps these results, on disk when it returns."""
        self.found |= values
        lines = "".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in values.items())
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # a torn line before ours must not swallow ours
                file.write(("\n" if file.tell() else "") + lines)


def kept_rows(
    kind: str,
    maker: Any,
    rows: Sequence[Any],
    make: Callable[[list[int]], Sequence[Any]],
    *,
    size: Callable[[Any], int],
    batch_size: int,
    title: str,
) -> list[Any]:
    """The result of every row, JSON-like: those known from the cache, the others made in batches of rows alike in size.

    Batches run from short rows to long ones, so that what a killed run has not made falls into the batches it would
    have had.

    Args:
        kind: as `Kept`.
        maker: as `Kept`.
        rows: JSON-like; equal rows are made once.
        make: called with indexes of rows; their results in that order.
        size: of a row, by which they are sorted.
        batch_size: rows at once.
        title: of the progress bar.
    """
    kept = Kept(kind, maker)
    keys = [sha256_of(row) for row in rows]
    first = {key: at for at, key in reversed(list(enumerate(keys)))}
    missing = sorted((at for key, at in first.items() if key not in kept.found), key=lambda at: (size(rows[at]), at))
    if missing:
        with progress_bar() as progress:
            bar = progress.add_task(title, total=len(missing))
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                kept.add(dict(zip((keys[at] for at in batch), make(batch), strict=True)))
                progress.advance(bar, len(batch))
    return [kept.found[key] for key in keys]
