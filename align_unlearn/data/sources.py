"""Where rows come from: the shipped corpus, a local file or folder, a hub id, or any Python iterable.

A source is written `NAME[:CONFIG][@SPLIT]`. `NAME` is `builtin:harmful` and its like, a path (JSON, JSON lines, CSV,
Parquet, plain text), a folder of such files, or a hub id. On a local file `@SPLIT` keeps the rows whose column `split`
says so; in a folder it names the file; on the hub it is the split, `train` where none is given. `@SPLIT[START:STOP]`
keeps a range of those rows, `@[START:STOP:STEP]` one of a whole file, as Python slices them.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_unlearn.errors import UserError, unknown_name

CORPUS = Path(__file__).parent / "corpus"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_RANGE = re.compile(r"\[(-?\d+)?:(-?\d+)?(?::([1-9]\d*))?\]$")


@dataclass(frozen=True)
class Row:
    """A row as it was read, and where: `corpus.jsonl, row 3`."""

    columns: dict[str, Any]
    where: str


def read_rows(source: str | Iterable[dict[str, Any]]) -> list[Row]:
    """All rows of a source.

    Raises:
        UserError: nothing is there, it is empty, it is not UTF-8, or it is not of its format.
    """
    if not isinstance(source, str):
        rows = []
        for number, columns in enumerate(source, 1):
            if not isinstance(columns, Mapping):
                raise UserError(f"A row is a mapping of columns, not {type(columns).__name__}.", where=f"row {number}")
            rows.append(Row(dict(columns), f"row {number}"))
        return _not_empty(rows, "the iterable")
    name, _, split = (source, "", "") if Path(source).exists() else source.partition("@")
    kept = slice(None)
    if found := _RANGE.search(split):
        split = split[: found.start()]
        kept = slice(*(int(number) if number else None for number in found.groups()))
    return _not_empty(_rows_of_split(name, split, source)[kept], source)


def _rows_of_split(name: str, split: str, source: str) -> list[Row]:
    if name.startswith("builtin:"):
        rows = _builtin(name.removeprefix("builtin:"))
    elif Path(name).is_file():
        rows = _file(Path(name))
    elif Path(name).is_dir():
        return _file(_in_folder(Path(name), split or "train"))
    elif Path(name).suffix in SUFFIXES or name.startswith((".", "/", "~")):
        raise UserError("There is no such file.", where=name, fix="check the path; it is taken from where you run")
    else:
        return _hub(name, split)
    return _of_split(rows, split, source) if split else rows


def builtin_names() -> list[str]:
    """The names behind `builtin:`."""
    return sorted(file.stem for file in CORPUS.iterdir() if file.suffix in SUFFIXES)


def _builtin(name: str) -> list[Row]:
    found = [file for file in CORPUS.iterdir() if file.stem == name and file.suffix in SUFFIXES]
    if not found:
        raise unknown_name("builtin dataset", name, builtin_names())
    return _file(found[0])


def _not_empty(rows: list[Row], source: str) -> list[Row]:
    if not rows:
        raise UserError("The data set is empty.", where=source)
    return rows


def _of_split(rows: list[Row], split: str, source: str) -> list[Row]:
    known = {str(row.columns["split"]) for row in rows if "split" in row.columns}
    if split not in known:
        if not known:
            raise UserError(f"The rows have no column 'split', so '@{split}' selects nothing.", where=source)
        raise unknown_name("split", split, known, where=source)
    return [row for row in rows if str(row.columns.get("split")) == split]


def _in_folder(folder: Path, split: str) -> Path:
    found = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES}
    if split not in found:
        raise unknown_name("file in the folder", split, found, where=str(folder))
    return found[split]


def _file(path: Path) -> list[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _numbered(_parquet(path), path)
    text = read_text(path)
    if suffix == ".txt":
        return _text(text, path)
    if suffix == ".csv":
        return _numbered(_csv(text, path), path)
    if suffix in (".json", ".jsonl"):
        return _json(text, path)
    raise UserError(f"Files of type '{suffix}' are not read.", where=str(path), fix=f"one of: {', '.join(SUFFIXES)}")


def _parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"Not a Parquet file: {str(error).splitlines()[0]}", where=str(path)) from error
    return rows


def _csv(text: str, path: Path) -> list[Any]:
    csv.field_size_limit(1 << 30)
    try:
        rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UserError(f"Not CSV: {error}.", where=str(path)) from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError("The row has another number of fields than the head line.", where=f"{path}, row {number}")
    return rows


def _text(text: str, path: Path) -> list[Row]:
    """A whole text is one passage: its first line is a title when a blank line follows it."""
    title, _, body = text.partition("\n\n")
    passage = body if body and "\n" not in title.strip() else text
    return [Row({"text": passage.strip()}, path.name)] if passage.strip() else []


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        UserError: it is not UTF-8; the line is named.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"The file is not UTF-8 text (line {line}, byte {error.start}).",
            where=str(path),
            fix="convert it, for example with: iconv -f latin1 -t utf-8",
        ) from error


def _json(text: str, path: Path) -> list[Row]:
    """A JSON array of objects, or JSON lines under either ending (benchmarks ship both as .json)."""
    if text.lstrip().startswith("["):
        try:
            return _numbered(json.loads(text), path)
        except json.JSONDecodeError as error:
            raise UserError(f"Not JSON: {error.msg} (line {error.lineno}).", where=str(path)) from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"Not JSON: {error.msg}.", where=f"{path}, line {number}") from error
    return _numbered(rows, path)


def _numbered(rows: list[Any], path: Path) -> list[Row]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"A row is an object, not {type(row).__name__}.", where=f"{path}, row {number}")
    return [Row(row, f"{path.name}, row {number}") for number, row in enumerate(rows, 1)]


def _hub(name: str, split: str) -> list[Row]:
    from datasets import load_dataset

    hub_id, _, config = name.partition(":")
    try:
        dataset = load_dataset(hub_id, config or None, split=split or "train")
    except Exception as error:  # the hub client raises many kinds; all mean that the data could not be had
        raise UserError(
            f"The data set could not be loaded: {str(error).splitlines()[0]}",
            where=name,
            fix=f"a file, a folder, a hub id, or one of: {', '.join('builtin:' + each for each in builtin_names())}",
        ) from error
    return list(_dataset_rows(dataset, hub_id))


def _dataset_rows(dataset: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    for number, columns in enumerate(dataset, 1):
        yield Row(dict(columns), f"{name}, row {number}")
