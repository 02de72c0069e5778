"""Which checkpoints are whole, and the state that transformers does not know of.

`align_unlearn_state.json` is written last, in one step: a checkpoint without it was cut off while it was written and
is not resumed from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import rotate_checkpoints

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


class WholeCheckpoints:
    """A mix-in before a TRL trainer: checkpoints are marked as whole and hold what `extra_state` gives.

    The figures of the logging window that a kill cuts through are kept too.
    """

    # of the TRL trainer that this is mixed into
    args: Any
    state: Any
    _metrics: Any

    def extra_state(self, checkpoint: Path) -> dict[str, Any]:
        """What a trainer keeps in a checkpoint beside what all keep; files of its own go into the folder."""
        return {}

    def load_extra_state(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Takes up where `extra_state` was taken."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Marks the checkpoint as whole before older ones are removed, so that there is always a whole one."""
        args = self.args
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            args.save_total_limit = limit
        folder = Path(args.output_dir) / f"checkpoint-{self.state.global_step}"
        window = {name: list(values) for name, values in self._metrics["train"].items()}
        write_state(folder, {"log_window": window, **self.extra_state(folder)})
        rotate_checkpoints(output_dir=args.output_dir, save_total_limit=limit)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        state = read_state(Path(resume_from_checkpoint))
        for name, values in state["log_window"].items():
            self._metrics["train"][name].extend(values)
        self.load_extra_state(Path(resume_from_checkpoint), state)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a card into each checkpoint; the run folder's manifest and report say more."""
