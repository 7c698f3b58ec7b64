"""Who may import whom (the house plan): read from the source, so that a lazy import inside a function counts too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "t2r": ROOT / "t2r",
    "t2r_kernels": ROOT / "kernels" / "t2r_kernels",
    "t2r_evals": ROOT / "evals" / "t2r_evals",
    "t2r.model": ROOT / "t2r" / "model",
    "t2r.convert": ROOT / "t2r" / "convert",
    "t2r.train": ROOT / "t2r" / "train",
    "t2r.cli": ROOT / "t2r" / "cli",
}
LEAVES = {"t2r", "t2r.errors", "t2r.hub", "t2r.publish", "t2r.resources", "t2r.versions"}
MAY_IMPORT = {
    "t2r_kernels": set(),
    "t2r_evals": set(),
    "t2r.model": {"t2r_kernels"},
    "t2r.convert": {"t2r_kernels", "t2r.model"},
    "t2r.train": {"t2r_kernels", "t2r.model", "t2r.recipe"},
}


def imported_modules(path: Path, room: str) -> set[str]:
    """Names of every module the file imports, at any depth; a relative import stays in its room."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level <= len(path.relative_to(ROOMS[room]).parts), f"{path}: a relative import leaves its room"
            names.add(room)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            if node.module == "t2r":
                names |= {f"t2r.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str | None:
    """The room or leaf of ours that a module belongs to; None for other people's modules."""
    if module.split(".")[0] not in ("t2r", "t2r_kernels", "t2r_evals"):
        return None
    for name in sorted({*ROOMS, *LEAVES, "t2r.recipe", "t2r.generate"}, key=len, reverse=True):
        if module == name or module.startswith(name + "."):
            return name
    return module


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room_imports_only_what_it_may(room):
    files = sorted(ROOMS[room].rglob("*.py"))
    assert files, f"{room} is empty"
    allowed = MAY_IMPORT[room] | {room} | (LEAVES if room.startswith("t2r.") else set())
    wrong = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in files
        for module in imported_modules(path, room)
        if room_of(module) not in allowed | {None}
    }
    assert not wrong


def test_only_the_command_line_calls_the_evaluation():
    outside = [p for p in (ROOT / "t2r").rglob("*.py") if ROOMS["t2r.cli"] not in p.parents]
    assert not [p for p in outside if any(room_of(m) == "t2r_evals" for m in imported_modules(p, "t2r"))]


def test_the_folders_that_would_shadow_others_have_no_init():
    for folder in ("kernels", "evals", "recipes"):
        assert not (ROOT / folder / "__init__.py").exists()
