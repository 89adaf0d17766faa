"""Each name of ComfyUI's that HSWQ uses may go: one sentence says so, and the rest works."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hswq.loader.host import selfcheck
from hswq.loader.host.selfcheck import (
    BASE,
    COMPARING,
    MEASURING,
    PANEL,
    PARTS,
    QUANTIZING,
    RECORDING,
    Part,
)

LOADER = Path(selfcheck.__file__).parents[1]
SECONDS = 280
HOSTS = {"comfy", "comfy_execution", "folder_paths", "kornia", "nodes", "server"}
"""Packages whose names can go; comfy_api is ComfyUI's promise."""

NODES = {
    BASE.does: {"HSWQMergeStatistics"},
    QUANTIZING.does: {
        "HSWQCheckpointLoader", "HSWQDiffusionModelLoader", "HSWQConverter", "HSWQExport",
        "HSWQPlan",
    },
    RECORDING.does: {"HSWQCalibration"},
    MEASURING.does: {"HSWQMeasureEffect", "HSWQVerify"},
    COMPARING.does: {"HSWQCompare"},
    PANEL.does: set(),
}  # fmt: skip
FILES = {
    "engine/alive.py": (),
    "engine/effect.py": (MEASURING,),
    "engine/patchers.py": (RECORDING,),
    "engine": (QUANTIZING,),
    "extension.py": (RECORDING, PANEL),
    "files": (),
    "host/version.py": (QUANTIZING,),
    "host": (),
    "jobs/effect.py": (MEASURING,),
    "jobs/sampling.py": (MEASURING,),
    "jobs/verify.py": (MEASURING,),
    "jobs": (QUANTIZING,),
    "nodes/calibration.py": (RECORDING,),
    "nodes/compare.py": (COMPARING,),
    "nodes/effect.py": (MEASURING,),
    "nodes/inputs.py": (RECORDING,),
    "nodes/verify.py": (MEASURING,),
    "nodes": (QUANTIZING,),
    "panel": (PANEL,),
    "recording": (RECORDING,),
    "store": (),
}
"""Which parts a file or a room may use the names of, beside BASE's; the first match counts."""


@pytest.fixture(scope="module")
def found() -> list[dict]:
    """What starts where some names are missing; first where none is."""
    script = Path(__file__).with_name("selfcheck_process.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def names_of(part: Part) -> list[str]:
    return [f"{module}.{name}" for module, names in part.names.items() for name in names.split()]


def expected(off: list[Part]) -> dict:
    """What there is without some parts."""
    on = [part for part in (BASE, *PARTS) if part not in off and BASE not in off]
    if QUANTIZING not in on or RECORDING not in on:
        on = [part for part in on if part is not MEASURING]  # whose nodes need both
    return {
        "nodes": sorted(set().union(*(NODES[part.does] for part in on))),
        "recording": RECORDING in on,
        "panel": PANEL in on,
    }


class TestStart:
    def test_with_all_names_all_works_and_nothing_is_said(self, found: list[dict]):
        assert found[0] == {"taken": [], "messages": [], **expected([])}

    def test_without_a_name_what_needs_it_is_off_and_one_sentence_says_so(self, found: list[dict]):
        for without in found[1:]:
            taken, (sentence,) = without["taken"], without["messages"]
            told = re.findall(r"[\w.]*\w", sentence)
            assert set(taken) <= set(told), sentence
            for name in taken:
                off = [
                    part for part in (BASE, *PARTS)
                    if any(f"{one}.".startswith(f"{name}.") for one in names_of(part))
                ]  # fmt: skip
                assert expected(off).items() <= without.items(), name
                assert BASE in off or all(part.does in sentence for part in off), sentence
        taken = [name for without in found for name in without["taken"]]
        assert sorted(taken) == sorted({name for part in (BASE, *PARTS) for name in names_of(part)})


def used_names(path: Path) -> Iterator[str]:
    """Give the whole names that a file takes from ComfyUI."""
    tree, known = ast.parse(path.read_text("utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {one.asname or one.name.split(".")[0]: one.name if one.asname
                      else one.name.split(".")[0] for one in node.names}  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}

    def whole(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{whole(node.value)}.{node.attr}"
        return known.get(node.id, "") if isinstance(node, ast.Name) else ""

    used = {*known.values(), *map(whole, ast.walk(tree))}
    yield from (name for name in used if name.split(".")[0] in HOSTS)


def checkable(name: str) -> str | None:
    """Return the part of a name that can be missing: an attribute of a module or of a class."""
    words = name.split(".")
    for count in range(len(words), 0, -1):
        try:
            owner = importlib.import_module(".".join(words[:count]))
        except ImportError:
            continue
        break
    for position, word in enumerate(words[count:], count + 1):
        owner = getattr(owner, word, None)  # what instances have is not in the class
        if not inspect.isclass(owner):
            return ".".join(words[:position])
    return name if words[count:] else None


@pytest.mark.parametrize("path", sorted(LOADER.rglob("*.py")), ids=lambda path: path.stem)
def test_every_name_that_is_used_is_checked(path: Path):
    place = path.relative_to(LOADER).as_posix()
    parts = next((parts for start, parts in FILES.items() if place.startswith(start)), ())
    known = {name for part in (BASE, *parts) for name in names_of(part)}
    used = set(map(checkable, used_names(path))) - {None}
    assert used - known == set(), "add them to loader/host/selfcheck.py"
