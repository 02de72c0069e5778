"""Which checkpoints are whole, and the state that transformers does not know of.

`align_unlearn_state.json` is written last, in one step: a checkpoint without it was cut off while it was written and
is not resumed from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align_unlearn.errors import UserError
from align_unlearn.files import write_json

STATE = "align_unlearn_state.json"


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Marks `checkpoint` as whole and keeps `state` in it."""
    write_json(checkpoint / STATE, state)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_state` kept.

    Raises:
        UserError: the checkpoint is not whole.
    """
    file = checkpoint / STATE
    if not file.is_file():
        raise UserError(
            "The checkpoint is not whole: it was cut off while it was written.",
            where=str(checkpoint),
            fix="resume from an earlier one",
        )
    state: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return state


def last_whole_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end."""
    numbered = {
        int(folder.name.removeprefix("checkpoint-")): folder
        for folder in run.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit() and (folder / STATE).is_file()
    }
    return numbered[max(numbered)] if numbered else None
