"""Imports run one way. A room may use what stands before it, never what stands after."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "align_unlearn"
ORDER = [
    {"errors"},
    {"files", "imports", "judge"},
    {"config", "run_dir"},
    {"data", "modeling"},
    {"objectives", "rewards", "doctor"},
    {"training"},
    {"audit"},
    {"export", "report"},
    {"cli", "script"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FORBIDDEN = {
    "rewards": {"judge"},
    "audit": {"training", "objectives", "rewards"},
    "export": {"training", "objectives"},
    "report": {"training", "audit"},
}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "align_unlearn" and len(parts) > 1 else None


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file):
    room = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for module in imported(file):
        assert not module.startswith("reward_models"), "reward models are named only through the loader"
        other = room_of(module)
        if other is not None and other != room:
            assert LEVEL[other] <= LEVEL[room], f"{room} must not import {other}"
            assert other not in FORBIDDEN.get(room, set()), f"{room} must not know {other}"


@pytest.mark.parametrize("name", ["errors", "config", "files", "imports", "run_dir", "cli", "script"])
def test_the_light_rooms_never_import_torch(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(each.split(".")[0] in ("torch", "transformers", "peft") for each in names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_one_idea(file):
    assert len(file.read_text("utf-8").splitlines()) < 400
    assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), "the first docstring says in prose what it is"
