"""Writing so that nothing is lost, and naming content by its hash.

Every file this project writes appears under its name only when it is whole: it is written beside its place under a
temporary name and renamed. Of a killed process a `.tmp-…` file may be left, never half a manifest; folders, which could
be loaded, are cleared away by a process that outlives it, or by the next one where all were killed together.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from align_unlearn.errors import UserError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk or a read-only place into a `UserError` that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors and torch report a full disk as errors of their own that only say so in words
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "os error 28" in str(error):
            raise UserError(
                "The disk is full; nothing was written under the final name.",
                where=str(path),
                fix="free some space, or choose another place with --output_dir",
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"Cannot write here: {error.strerror}.", where=str(path), fix="choose a folder you may write to"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise UserError("A file stands where a folder must be.", where=str(path), fix="another path") from error
        raise


def check_folder(path: Path) -> None:
    """Refuses a path at which no folder can be, before work is spent on what was to be written there.

    Raises:
        UserError: it is a file, or lies in one.
    """
    if file := next((each for each in (path, *path.parents) if each.is_file()), None):
        raise UserError("A file stands where a folder must be.", where=str(file), fix="another path")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` in one step (temporary name, flush, rename)."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 `text` to `path` in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON in one step. Not-a-number is refused: JSON has no word for it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads what `write_json_lines` wrote. Lines end at \\n alone: a text may hold other line separators of Unicode."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


DRAFT = f".tmp-{socket.gethostname()}-"
UNTIL_WE_END = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
"""The pipe is closed by whatever ends this process."""


def _sweep(folder: Path) -> None:
    """Removes the drafts of processes of this machine that were killed before they could do it themselves."""
    for draft in folder.glob(f"{DRAFT}*-*"):
        owner = draft.name.removeprefix(DRAFT).partition("-")[0]
        if owner.isdigit() and not _runs(int(owner)):
            shutil.rmtree(draft, ignore_errors=True)


def _runs(process: int) -> bool:
    if os.name != "posix":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's
        return True
    return True


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` only when the block ends well.

    Raises:
        UserError: `path` exists and is no empty folder, as the block begins or as it ends; or the disk is full.
    """
    _check_empty(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        with _draft(path.parent) as draft:
            yield draft
            draft.chmod(0o755)
            for file in draft.glob("*.safetensors"):  # which safetensors writes for its owner alone
                file.chmod(0o644)
            try:
                if path.exists():
                    path.rmdir()
                os.replace(draft, path)
            except OSError:
                _check_empty(path)  # another process may have been quicker
                raise


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder beside a draft for what is only passed on; gone when the block ends."""
    with _draft(beside.parent) as folder:
        yield folder


@contextlib.contextmanager
def _draft(parent: Path) -> Iterator[Path]:
    """A folder that is gone when the block ends, unless it was renamed; and when this process is killed within it."""
    draft = Path(tempfile.mkdtemp(prefix=f"{DRAFT}{os.getpid()}-", dir=parent))
    command = [sys.executable, "-I", "-S", "-c", UNTIL_WE_END, str(draft)]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              start_new_session=True) as watch:  # fmt: skip
            try:
                yield draft
            finally:
                watch.kill()
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_empty(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError("The destination exists and is not empty.", where=str(path), fix="choose a new folder")


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def sha256_of(value: Any) -> str:
    """The SHA-256 of a JSON-like value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def sha256_of_folder(path: Path, pattern: str = "*.safetensors") -> str:
    """One SHA-256 for the files of a folder that match `pattern`: their names and their contents."""
    files = sorted(path.glob(pattern))
    return sha256_of({file.name: sha256_of_file(file) for file in files})
