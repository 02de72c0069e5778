"""`module:name` and `file.py:name`: how a user's own function or class is named in a recipe."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from align_unlearn.errors import UserError, unknown_name


def import_by_name(name: str, *, kind: str) -> Any:
    """What `module:name` or `path/to/file.py:name` points to.

    Raises:
        UserError: the module or file does not exist, does not import, or has no such name.
    """
    place, _, attribute = name.rpartition(":")
    module = _from_file(Path(place), kind) if place.endswith(".py") else _from_module(place, kind)
    if not hasattr(module, attribute):
        public = [entry for entry in vars(module) if not entry.startswith("_")]
        raise unknown_name(f"{kind} in {place}", attribute, public)
    return getattr(module, attribute)


def _from_module(place: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:  # the user's own program may raise anything
        raise UserError(f"The {kind}'s module does not import: {type(error).__name__}: {error}", where=place) from error


def _from_file(file: Path, kind: str) -> ModuleType:
    if not file.is_file():
        raise UserError(f"There is no such file for the {kind}.", where=str(file))
    name = f"align_unlearn_user_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own program may raise anything
        del sys.modules[name]
        raise UserError(f"The {kind}'s file does not run: {type(error).__name__}: {error}", where=str(file)) from error
    return module
