"""`doctor`: will a run work on this machine? Each check does the thing itself, on a small scale."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

from align_unlearn.modeling.embedded import cache_folder
from align_unlearn.run_dir import versions


@dataclass(frozen=True)
class Check:
    """One check and what it found."""

    name: str
    passed: bool
    detail: str


def checks() -> list[Check]:
    """All checks, in the order a person reads them."""
    return [_try(name, check) for name, check in _CHECKS.items()]


def _try(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:  # a broken native library may raise anything; that is what is looked for here
        return Check(name, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _libraries() -> tuple[bool, str]:
    found = versions()
    return "not installed" not in found.values(), ", ".join(f"{name} {version}" for name, version in found.items())


def _gpu() -> tuple[bool, str]:
    if not torch.cuda.is_available():
        return True, f"none; training runs on {torch.get_num_threads()} CPU threads"
    properties = torch.cuda.get_device_properties(0)
    return True, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _four_bit() -> tuple[bool, str]:
    """Quantise and de-quantise a matrix as a base would be, and compare."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    codes, state = quantize_4bit(weight, quant_type="nf4")
    error = float((dequantize_4bit(codes, state) - weight).norm() / weight.norm())
    return error < 0.15, f"NF4 round trip on {device}: relative error {error:.3f}"


def _disk() -> tuple[bool, str]:
    place = cache_folder()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    return free > 2, f"{free:.0f} GiB free at {place} (a run of the embedded model needs 2)"


def _cache() -> tuple[bool, str]:
    models = cache_folder() / "models"
    found = sorted(folder.name for folder in models.iterdir()) if models.is_dir() else []
    return True, f"{cache_folder()}: {', '.join(found) or 'no model yet'}"


_CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {
    "libraries": _libraries,
    "GPU": _gpu,
    "4-bit": _four_bit,
    "disk": _disk,
    "cache": _cache,
}
