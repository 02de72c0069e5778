"""Forget and retain rows drawn together: each item is one forget row with one retain row beside it.

The order is a pure function of seed and epoch, so that a run that is killed and resumed draws what an unbroken run
draws. Every retain row is seen once before any is seen twice, whatever the sizes of the two sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from align_unlearn.data.tokens import IGNORE


class PairedRows(Dataset[dict[str, Any]]):
    """Forget rows by their index, retain rows beside them. Indexed by what `PairSampler` yields."""

    def __init__(self, forget: Any, retain: Any | None) -> None:
        self.forget = forget
        self.retain = retain

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: tuple[int, int | None]) -> dict[str, Any]:
        forget, retain = index
        return {"forget": self.forget[forget], "retain": None if retain is None else self.retain[retain]}  # type: ignore[index]


class PairSampler(Sampler[tuple[int, "int | None"]]):
    """Yields (forget index, retain index); the retain index is None where there is no retain set."""

    def __init__(self, forget: int, retain: int | None, seed: int) -> None:
        self.forget = forget
        self.retain = retain
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.forget

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        order = _permutation(self.forget, self.seed, 0, self.epoch)
        if self.retain is None:
            yield from ((index, None) for index in order)
            return
        retain = Cycle(self.retain, self.seed)
        yield from ((index, retain[at]) for at, index in enumerate(order, start=self.epoch * self.forget))


class Cycle:
    """Rows in an endless order: every row is drawn once before any is drawn twice.

    Args:
        size: how many rows there are.
        seed: of the order.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._passes: dict[int, list[int]] = {}

    def __getitem__(self, position: int) -> int:
        """The row at a position, which is a pure function of seed and position."""
        number, at = divmod(position, self.size)
        if number not in self._passes:
            self._passes[number] = _permutation(self.size, self.seed, 1, number)
        return self._passes[number][at]


def _permutation(size: int, seed: int, stream: int, number: int) -> list[int]:
    generator = torch.Generator().manual_seed(hash((seed, stream, number)) % 2**63)
    return [int(index) for index in torch.randperm(size, generator=generator)]


class PairCollator:
    """A batch: what the forget collator makes, and under `retain` a padded batch of the retain rows."""

    def __init__(self, forget_collator: Callable[[list[Any]], dict[str, Any]], pad_token_id: int) -> None:
        self.forget_collator = forget_collator
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [item["forget"] for item in items]
        batch = self.forget_collator(rows)
        if "forget" in rows[0]:
            # preference rows the other way round stand among those to forget; figures of forgetting leave them out
            batch["is_forget"] = torch.tensor([row["forget"] for row in rows])
        retain = [item["retain"] for item in items if item["retain"] is not None]
        return {**batch, "retain": pad_rows(retain, self.pad_token_id)} if retain else batch


def pad_rows(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Rows of `input_ids` and `labels`, and what stands beside them, as tensors padded on the right.

    The attention mask comes from positions, never from comparing with the pad token, which may be the EOS.

    Returns:
        `input_ids`, `attention_mask`, `labels` of shape (B, T + 1); where rows have them, `ref_logps` of shape (B, T),
        `ref_hidden` of shape (N, H) for the N labelled positions, and under `chosen` the same of the chosen answers.
    """
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[Sequence[Any]], fill: Any, size: int) -> Tensor:
        return torch.tensor([[*row, *([fill] * (size - len(row)))] for row in values])

    batch: dict[str, Any] = {
        "input_ids": padded([row["input_ids"] for row in rows], pad_token_id, width),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0, width),
        "labels": padded([row["labels"] for row in rows], IGNORE, width),
    }
    if "ref_logps" in rows[0]:
        batch["ref_logps"] = padded([row["ref_logps"] for row in rows], 0.0, width - 1)
    if "ref_hidden" in rows[0]:
        batch["ref_hidden"] = torch.cat([row["ref_hidden"] for row in rows])
    if "chosen" in rows[0]:
        batch["chosen"] = pad_rows([row["chosen"] for row in rows], pad_token_id)
    return batch


def pad_texts(rows: Sequence[list[int]], device: Any) -> dict[str, Tensor]:
    """Texts without labels of their own as one padded batch on a device: `input_ids`, `labels`, `attention_mask`."""
    batch = pad_rows([{"input_ids": row, "labels": row} for row in rows], 0)
    return {name: value.to(device) for name, value in batch.items()}
