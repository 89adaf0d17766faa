"""What Windows does otherwise: separators in names, files that are in use, devices' names.

What can be seen of it here: names with a backslash, and how a refusal to replace a file ends.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import folder_paths
import pytest
from harness.exports import SAMPLES, record, target_of, wanted
from harness.modelfiles import end_hashing
from hswq.calibration import Statistics
from hswq.loader import store
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.host.folders import statistics_folder
from hswq.loader.jobs import choice
from hswq.loader.jobs.export import ExportError, export
from hswq.loader.jobs.model_files import find_source, source_path, sources
from hswq.loader.jobs.output_path import default_name, export_path
from hswq.loader.store.search_cache import findings_key, keep_findings
from hswq.quant import QuantizeSettings
from toy.checkpoint import make_checkpoint

pytestmark = pytest.mark.usefixtures("folders")

NAME = "sub\\toy one.safetensors"
IN_USE = "The process cannot access the file because it is being used by another process"


def files_in(folder: Path) -> dict[Path, bytes]:
    """Return the files in a folder once none is being hashed; locks are nobody's data."""
    end_hashing()
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in files}


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be replaced, as while a program or a loaded model has it open."""

    def refuse(source: os.PathLike, target: os.PathLike) -> None:
        raise PermissionError(13, IN_USE, os.fspath(source), 32, os.fspath(target))

    monkeypatch.setattr(os, "replace", refuse)


class TestNames:
    @pytest.fixture
    def path(self, folders) -> Path:
        """A checkpoint that ComfyUI lists with a backslash in its name."""
        return make_checkpoint(folders / "output" / "checkpoints" / NAME)

    def test_of_sources(self, path):
        assert f"checkpoints/{NAME}" in sources()
        assert source_path(f"checkpoints/{NAME}") == str(path)
        assert find_source(fingerprint(str(path)), "other") == f"checkpoints/{NAME}"

    def test_of_an_export(self):
        name = default_name(f"checkpoints/{NAME}", "scaled")
        assert export_path(name, "checkpoints").parent.name == "checkpoints"

    def test_of_statistics(self, path, statistics):
        record(str(path), statistics)
        (made,) = Path(folder_paths.models_dir).rglob("*.pt")
        assert made.parent == statistics_folder()
        assert store.statistics_of(fingerprint(str(path))).samples == SAMPLES

    @pytest.mark.parametrize("name", ["con", "NUL", "com1", "aux"])
    def test_that_windows_reserves(self, name):
        with pytest.raises(ValueError, match="not a name that an operating system reserves"):
            store.statistics_path(None, name, "toy")
        path = store.statistics_path("0" * 64, "recorded", f"{name}.safetensors")
        assert path.name.startswith(f"_{name}.")


class TestFilesInUse:
    def test_statistics_stay_as_they_were(self, checkpoint, statistics, folders, in_use):
        one = Statistics(statistics, {"samples": 1})
        with pytest.raises(OSError, match=rf"^toy\.\w+\.recorded\.pt cannot be written: {IN_USE}$"):
            store.add_statistics(
                store.NewSums(one, fingerprint(str(checkpoint)), "recorded", "toy")
            )
        assert not files_in(folders)

    def test_an_export_says_what_to_do(self, recorded, folders, in_use):
        settings = wanted("compatible", without=choice.QUANTIZE_UNIFORMLY)
        target = target_of(settings)
        target.parent.mkdir(parents=True)
        target.write_bytes(b"a loaded model's")
        before = files_in(folders)
        with pytest.raises(ExportError) as caught:
            export(recorded, target, settings, overwrite=True)
        assert str(caught.value) == (
            f"exported.safetensors cannot be written ({IN_USE}): if a loaded model or a program "
            "uses it, choose another filename"
        )
        assert files_in(folders) == before

    def test_a_plan_is_made_again_next_time(self, plans, folders, in_use, caplog):
        with caplog.at_level(logging.WARNING):
            keep_findings(findings_key("0" * 64, "", QuantizeSettings()), plans[True], SAMPLES)
        assert IN_USE in caplog.text
        assert not files_in(folders)
