"""The original's final hidden states on retain rows, computed once and kept on disk.

With them the exact KL needs no forward pass of the original in any step. They take tokens × hidden numbers (the
vocabulary's share of a logit cache is 50 to 100 times that) and are memory-mapped, so that they cost no memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from align_unlearn.data.batches import pad_rows
from align_unlearn.data.tokens import IGNORE
from align_unlearn.errors import UserError
from align_unlearn.files import disk_errors, sha256_of, write_json
from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.load import weights_fingerprint
from align_unlearn.modeling.roles import original


class RowsWithHidden(Dataset[dict[str, Any]]):
    """Rows of `input_ids` and `labels` with `ref_hidden` (n, H) beside them, read from a memory map.

    Args:
        rows: the rows.
        hidden: (N, H) of all labelled positions, row after row.
    """

    def __init__(self, rows: Any, hidden: Tensor) -> None:
        self.rows = rows
        self.hidden = hidden
        self.bounds = [0, *torch.tensor(labelled(rows)).cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        piece = self.hidden[self.bounds[index] : self.bounds[index + 1]]
        return {**self.rows[index], "ref_hidden": piece.clone()}


def with_ref_hidden(rows: Any, model: Any, folder: Path, *, batch_size: int) -> RowsWithHidden:
    """The rows with the original's hidden states, from `folder` where they lie there already.

    Args:
        rows: of `input_ids` and `labels`.
        model: the policy; its adapters are switched off for this.
        folder: of the run's cache.
        batch_size: rows computed at once.

    Raises:
        UserError: the folder holds a cache of other rows (data or tokenizer) or of another model, or the disk is full.
    """
    meta = {
        "rows": sha256_of([rows["input_ids"][:], rows["labels"][:]]),
        "model": weights_fingerprint(model),
        "positions": sum(labelled(rows)),
    }
    file, note = folder / "ref_hidden.bin", folder / "ref_hidden.json"
    if note.is_file() and file.is_file():
        found = json.loads(note.read_text("utf-8"))
        for part, name in (("rows", "data or tokenizer"), ("model", "model")):
            if found[part] != meta[part]:
                raise UserError(
                    f"The cache of the original's hidden states was made from another {name}.",
                    where=str(folder),
                    fix="remove the folder, or take another --output_dir",
                )
        return RowsWithHidden(rows, _mapped(file, found))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / ".tmp-ref_hidden.bin"
        meta |= _compute(rows, model, draft, batch_size)
        os.replace(draft, file)
        write_json(note, meta)
    return RowsWithHidden(rows, _mapped(file, meta))


def labelled(rows: Any) -> list[int]:
    """How many labelled positions each row has. The first token of a row is predicted by nothing."""
    return [sum(label != IGNORE for label in labels[1:]) for labels in rows["labels"][:]]


@torch.no_grad()
def _compute(rows: Any, model: Any, file: Path, batch_size: int) -> dict[str, Any]:
    """Writes the states to `file` as they come, and returns how to read them."""
    kind: torch.dtype | None = None
    width = 0
    with file.open("wb") as out, progress_bar() as progress:
        bar = progress.add_task("hidden states of the original", total=len(rows))
        for hidden in _hidden_of_batches(rows, model, batch_size):
            kind, width = hidden.dtype, hidden.shape[-1]
            out.write(hidden.contiguous().view(torch.uint8).numpy().tobytes())
            progress.advance(bar, batch_size)
        out.flush()
        os.fsync(out.fileno())
    return {"dtype": str(kind).removeprefix("torch."), "width": width}


def _hidden_of_batches(rows: Any, model: Any, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(rows), batch_size):
        batch = pad_rows([rows[index] for index in range(start, min(start + batch_size, len(rows)))], 0)
        mask = batch["labels"][:, 1:] != IGNORE
        with original(model) as base:
            ids, attention = (batch[name].to(base.device) for name in ("input_ids", "attention_mask"))
            yield hidden_states(base, ids, attention)[:, :-1].cpu()[mask]


def _mapped(file: Path, meta: dict[str, Any]) -> Tensor:
    size = meta["positions"] * meta["width"]
    flat = torch.from_file(str(file), shared=False, size=size, dtype=getattr(torch, meta["dtype"]))
    return flat.view(meta["positions"], meta["width"])
