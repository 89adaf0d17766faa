"""The rooms keep to themselves: who may import whom (each room's docstring says the same)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = {"quant", "calibration"}
MAY_IMPORT = {
    "quant": set(),
    "calibration": set(),
    "host": set(),
    "files": {"host", *CORE},
    "store": {"host", "files", *CORE},
    "engine": {"host", "files", *CORE},
    "recording": {"host", "files", "store", "engine", *CORE},
    "jobs": {"host", "files", "store", "engine", *CORE},
    "nodes": {"host", "files", "store", "engine", "recording", "jobs", *CORE},
    "panel": {"host", "files", "store", "engine", "recording", "jobs", *CORE},
}


def folder_of(room: str) -> Path:
    return ROOT / room if room in CORE else ROOT / "loader" / room


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms that a file imports from, its own among them."""
    package, found = path.relative_to(ROOT).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [[*filter(None, base), alias.name] for alias in node.names]
            found |= {name[1] if name[0] == "loader" else name[0] for name in names}
    return found


def test_every_folder_is_a_room():
    folders = {path.parent.name for path in (ROOT / "loader").glob("*/__init__.py")}
    assert folders | CORE == MAY_IMPORT.keys()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_only_what_it_may(room: str):
    for path in folder_of(room).rglob("*.py"):
        assert imported_rooms(path) <= MAY_IMPORT[room] | {room}, path


def arrows() -> set[tuple[str, str]]:
    """Return which room imports which."""
    return {
        (room, other)
        for room in MAY_IMPORT
        for path in folder_of(room).rglob("*.py")
        for other in imported_rooms(path) & MAY_IMPORT.keys() - {room}
    }


def floor_of(room: str, found: set[tuple[str, str]]) -> int:
    """Return 1 for a room that imports none, else one more than the highest that it imports."""
    return 1 + max((floor_of(other, found) for one, other in found if one == room), default=0)


if __name__ == "__main__":
    FOUND = arrows()
    FLOORS = {room: floor_of(room, FOUND) for room in MAY_IMPORT}
    print(f"{len(FLOORS)} rooms, {max(FLOORS.values())} floors, {len(FOUND)} arrows, none upward")
    for name, floor in FLOORS.items():
        print(f"{floor}  {name}: {', '.join(sorted(other for one, other in FOUND if one == name))}")
