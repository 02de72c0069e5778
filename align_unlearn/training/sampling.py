"""The order in which rows are learned from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class MixedLengthGroups(LengthGroupedSampler):  # type: ignore[misc]
    """Batches of rows alike in length, in random order.

    transformers' sampler goes from long batches to short ones, again and again. Where sources differ in length that is
    one source after another, and the last one heard wins. The order depends on the seed and the epoch alone, so a
    resumed run sees the rows it would have seen.

    Args:
        batch_size: rows of a batch.
        lengths: of every row, in tokens.
        seed: of the order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next; accelerate calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + 1000 * self.epoch)
        order: list[Any] = list(super().__iter__())
        batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        rest = batches.pop() if len(batches[-1]) < self.batch_size else []
        # the longest batch stays first, so that a run that does not fit into memory says so at once
        middle = torch.randperm(max(0, len(batches) - 1), generator=self.generator) + 1
        for at in [0, *middle.tolist()] if batches else []:
            yield from batches[at]
        yield from rest
