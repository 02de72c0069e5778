"""What an audit cost: seconds and answered tokens of each stage, and the memory of the process at its peak."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from align_unlearn.modeling.memory import peak_memory


class Costs:
    """Seconds by stage, in the order in which they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the block's seconds under `name`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def described(self, tokens: int) -> dict[str, Any]:
        """As `audit.json` holds it."""
        return {
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "total_seconds": round(sum(self.seconds.values()), 1),
            "answered_tokens": tokens,
            "peak_memory_bytes": peak_memory(),
            "threads": torch.get_num_threads(),
        }
