"""What the original says of the rows, computed once, kept on disk and memory-mapped.

Its final hidden states on retain rows: with them the exact KL needs no forward pass of the original in any step. They
take tokens × hidden numbers (a cache of logits would take 50 to 100 times that). Its log-probabilities of forget rows:
one number a token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
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
from align_unlearn.modeling.lm_head import LMHead, token_logps
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
    return RowsWithHidden(
        rows, kept(folder / "ref_hidden", rows, model, batch_size, lambda hidden, labels, head: hidden)
    )


def with_ref_logps(rows: Any, model: Any, folder: Path, *, name: str, batch_size: int) -> list[list[float]]:
    """Each row's log-probabilities under the original, as `CompletionView` takes them: 0 where nothing is labelled.

    Args:
        rows: of `input_ids` and `labels`.
        model: the policy; its adapters are switched off for this.
        folder: of the run's cache.
        name: of these rows in it.
        batch_size: rows computed at once.

    Raises:
        UserError: as `with_ref_hidden`.
    """

    def read_out(hidden: Tensor, labels: Tensor, head: LMHead) -> Tensor:
        return token_logps(hidden, labels.to(hidden.device), head)[:, None]

    flat = kept(folder / f"ref_logps_{name}", rows, model, batch_size, read_out)[:, 0].tolist()
    found, at = [], 0
    for labels in rows["labels"][:]:
        row = [0.0] * (len(labels) - 1)
        for position, label in enumerate(labels[1:]):
            if label != IGNORE:
                row[position] = flat[at]
                at += 1
        found.append(row)
    return found


ReadOut = Callable[[Tensor, Tensor, LMHead], Tensor]


def kept(place: Path, rows: Any, model: Any, batch_size: int, read_out: ReadOut) -> Tensor:
    """What the original says at every labelled position, (N, W), row after row: computed once, then memory-mapped.

    Args:
        place: of `PLACE.bin` and, beside it, `PLACE.json`, which says what it was made from.
        rows: of `input_ids` and `labels`.
        model: the policy; its adapters are switched off for this.
        batch_size: rows computed at once.
        read_out: (n, W) from the original's final hidden states (n, H), the labels (n,) and the LM head.

    Raises:
        UserError: it was made from other rows or another model, or the disk is full.
    """
    meta = {
        "rows": sha256_of([rows["input_ids"][:], rows["labels"][:]]),
        "model": weights_fingerprint(model),
        "positions": sum(labelled(rows)),
    }
    file, note = place.with_suffix(".bin"), place.with_suffix(".json")
    if note.is_file() and file.is_file():
        found = json.loads(note.read_text("utf-8"))
        for part, name in (("rows", "data or tokenizer"), ("model", "model")):
            if found[part] != meta[part]:
                raise UserError(
                    f"What is kept of the original here was computed from another {name}.",
                    where=str(place),
                    fix="remove the folder, or take another --output_dir",
                )
        return _mapped(file, found)
    with disk_errors(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(f".tmp-{place.name}.bin")
        meta |= _write(_of_batches(rows, model, batch_size, read_out), len(rows), draft)
        os.replace(draft, file)
        write_json(note, meta)
    return _mapped(file, meta)


def labelled(rows: Any) -> list[int]:
    """How many labelled positions each row has. The first token of a row is predicted by nothing."""
    return [sum(label != IGNORE for label in labels[1:]) for labels in rows["labels"][:]]


def _write(batches: Iterator[tuple[int, Tensor]], rows: int, file: Path) -> dict[str, Any]:
    """Writes what comes to `file` and returns how to read it."""
    kind: torch.dtype | None = None
    width = 0
    with file.open("wb") as out, progress_bar() as progress:
        bar = progress.add_task("what the original says", total=rows)
        for count, piece in batches:
            kind, width = piece.dtype, piece.shape[-1]
            out.write(piece.contiguous().view(torch.uint8).numpy().tobytes())
            progress.advance(bar, count)
        out.flush()
        os.fsync(out.fileno())
    return {"dtype": str(kind).removeprefix("torch."), "width": width}


def _of_batches(rows: Any, model: Any, batch_size: int, read_out: ReadOut) -> Iterator[tuple[int, Tensor]]:
    """(rows, what is read out of them) a batch."""
    head = LMHead.of(model)
    for start in range(0, len(rows), batch_size):
        piece = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        batch = pad_rows([{name: row[name] for name in ("input_ids", "labels")} for row in piece], 0)
        targets = batch["labels"][:, 1:]
        mask = targets != IGNORE
        with original(model) as base:
            ids, attention = (batch[name].to(base.device) for name in ("input_ids", "attention_mask"))
            hidden = hidden_states(base, ids, attention)[:, :-1][mask.to(base.device)]
            yield len(piece), read_out(hidden, targets[mask], head).cpu()


def _mapped(file: Path, meta: dict[str, Any]) -> Tensor:
    size = meta["positions"] * meta["width"]
    flat = torch.from_file(str(file), shared=False, size=size, dtype=getattr(torch, meta["dtype"]))
    return flat.view(meta["positions"], meta["width"])
