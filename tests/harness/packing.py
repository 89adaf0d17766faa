"""The extension as the registry gives it: packed from a clone, unpacked into an empty ComfyUI."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy.checkpoint import make_checkpoint

from harness.fixtures import PROBE_NODES, reset_settings
from harness.prompts import CHECKPOINT
from harness.server import ROOT, ComfyUIServer

NAME = "hswq-quantizer"
"""Of its folder: what the registry's installers call it."""

COMFY_SECONDS = 120


def comfy(*words: str, folder: Path, home: Path) -> str:
    """Run comfy-cli in a folder, its own files in `home`; return what it printed."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    done = subprocess.run(
        [sys.executable, "-m", "comfy_cli", "--no-json", *words],
        cwd=folder, env={**kept, "HOME": str(home), "DO_NOT_TRACK": "1"},
        capture_output=True, text=True, timeout=COMFY_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last commit, cloned."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git repository")
    folder = tmp_path_factory.mktemp("clone") / "hswq"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def pack(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """What `comfy node pack` makes of it."""
    comfy("node", "pack", folder=clone, home=tmp_path_factory.mktemp("home"))
    with zipfile.ZipFile(clone / "node.zip") as file:
        yield file


@pytest.fixture(scope="session")
def packed_server(
    pack: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyUIServer]:
    """ComfyUI with the unpacked pack, the toy checkpoint and nothing of the repository."""
    server = ComfyUIServer(tmp_path_factory.mktemp("packed"), {"hswq_probe": PROBE_NODES})
    custom_nodes = server.base / "custom_nodes"
    (custom_nodes / "hswq").unlink()
    pack.extractall(custom_nodes / NAME)
    make_checkpoint(server.models / "checkpoints" / CHECKPOINT)
    reset_settings(server)
    with server:
        yield server
