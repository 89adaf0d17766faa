"""An older ComfyUI gets one sentence and no nodes."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import comfy.model_management as memory
import comfy.quant_ops
import comfyui_version
import nodes
import pytest
from harness.exports import target_of, wanted
from helpers import make_planner
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.host import version
from hswq.loader.jobs import choice
from hswq.loader.jobs.export import export

ROOT = Path(version.__file__).resolve().parents[2]
NODE = "HSWQCheckpointLoader"


class TestProblem:
    def test_none_here(self):
        assert version.problem() is None

    @pytest.mark.parametrize("found", [version.OLDEST, "0.27.1", "0.30", "1.0.0", "0.100.0-dev1"])
    def test_none_from_the_oldest_on(self, monkeypatch, found):
        monkeypatch.setattr(comfyui_version, "__version__", found)
        assert version.problem() is None

    @pytest.mark.parametrize("found", ["0.26.99", "0.3.77", "0.18.2", "0.9"])
    def test_names_both_versions(self, monkeypatch, found):
        monkeypatch.setattr(comfyui_version, "__version__", found)
        assert version.problem() == f"HSWQ needs ComfyUI {version.OLDEST} or newer, this is {found}"

    def test_a_comfyui_from_before_it_had_versions(self, monkeypatch):
        monkeypatch.delattr(comfyui_version, "__version__")
        assert version.problem().endswith("or newer, this is an older one")

    def test_a_comfyui_whose_requirements_were_not_updated(self, monkeypatch):
        class QuantizedTensor:
            """What ComfyUI has without comfy-kitchen."""

        monkeypatch.setattr(comfy.quant_ops, "QuantizedTensor", QuantizedTensor)
        assert "comfy-kitchen of ComfyUI's requirements.txt" in version.problem()

    def test_pyproject_says_the_same(self):
        line = re.search(r'requires-comfyui = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"))
        assert line[1] == f">={version.OLDEST}"


class TestDevice:
    def test_without_fp8_is_refused_by_name(self, monkeypatch, checkpoint, folders):
        monkeypatch.setattr(memory, "cpu_state", memory.CPUState.MPS)
        reason = "^mps has no FP8: choose the mode int8, which every device can$"
        with pytest.raises(ValueError, match=reason):
            load_checkpoint(str(checkpoint), make_planner(None, 0.25, scaled=True))
        settings = wanted(without=choice.QUANTIZE_UNIFORMLY)
        with pytest.raises(ValueError, match=reason):
            export(str(checkpoint), target_of(settings), settings)
        kept = {".cache", ".lock"}  # which say nothing of the model but who has used its file
        assert not [path for path in folders.rglob("*.*") if path.suffix not in kept]


class TestStart:
    @pytest.fixture
    def load(self, monkeypatch, tmp_path, caplog):
        """Let ComfyUI load the extension from its folder; returns whether it did, and the log."""
        place = tmp_path / "custom_nodes" / "hswq_here"
        place.parent.mkdir()
        place.symlink_to(ROOT, target_is_directory=True)
        for registry in ("NODE_CLASS_MAPPINGS", "EXTENSION_WEB_DIRS", "LOADED_MODULE_DIRS"):
            monkeypatch.setattr(nodes, registry, {})

        def load() -> tuple[bool, list[str]]:
            # In a thread: Playwright has a loop running in this one, if browser tests came before.
            with caplog.at_level(logging.INFO), ThreadPoolExecutor() as pool:
                loading = nodes.load_custom_node(str(place))
                loaded = pool.submit(asyncio.run, loading).result()
            return loaded, caplog.messages

        yield load
        for name in [name for name in sys.modules if name.startswith(str(place))]:
            del sys.modules[name]

    def test_of_an_older_one(self, load, monkeypatch):
        monkeypatch.setattr(comfyui_version, "__version__", "0.18.2")
        loaded, messages = load()
        assert loaded  # else ComfyUI calls it "IMPORT FAILED"
        sentence = f"HSWQ needs ComfyUI {version.OLDEST} or newer, this is 0.18.2"
        assert messages == [f"{sentence}: its nodes are not loaded."]
        assert not nodes.NODE_CLASS_MAPPINGS
        assert not nodes.EXTENSION_WEB_DIRS
