"""How much memory this process has taken at most."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> int:
    """Bytes: what tensors took on the GPU where there is one, else the process's highest resident size."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
