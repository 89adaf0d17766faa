"""What an export refuses, what it leaves when it breaks off, and the memory that it takes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import comfy.model_management
import comfy.utils
import pytest
import torch
from harness.exports import record, target_of, wanted, written
from harness.hostmemory import PeakMemory
from harness.inprocess import weight
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.files.errors import ModelFileError
from hswq.loader.files.tensor_file import DIGEST, lay_out
from hswq.loader.jobs import choice
from hswq.loader.jobs.export import export
from hswq.loader.jobs.leftovers import sweep_folders
from hswq.loader.jobs.output_path import ExportError, check_target, default_name, export_path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy.checkpoint import checkpoint_tensors, make_checkpoint

pytestmark = pytest.mark.usefixtures("folders")

PREFIX = "model.diffusion_model."


def leftovers(folder: Path) -> list[Path]:
    return [path for path in (folder / "output").rglob("*") if path.is_file()]


class TestName:
    @pytest.mark.parametrize(
        "name",
        [
            "../evil", "a/../../b", "/etc/passwd", "..", ".", "", "a//b", "a/", ".hidden", "a\0b",
            "a\\b", "C:evil", "a\nb", "con", "NUL.txt", "sub/com1", "lpt9 .x", "trailing.",
            "trailing ", "-rf", "a" * 201, "\ud800", "a*b", "$(x)", "..\\evil", "~/x", None, 3,
            "a/b.safetensors/../../../c", "a/" * 1500 + "a", "é" * 99 + "/" + "b" * 101,
        ],
    )  # fmt: skip
    def test_that_is_unsafe_is_refused(self, name):
        with pytest.raises(ValueError, match="the filename must be letters") as raised:
            export_path(name, "checkpoints")
        assert len(str(raised.value)) < 400

    @pytest.mark.parametrize(
        "name", ["a", "my model (v2).1", "sub/deep/a-b_c", "été", "模型", "a.safetensors", "_x"]
    )
    def test_that_is_plain_is_below_the_folder(self, name, folders):
        base = folders / "output" / "checkpoints"
        expected = base / f"{name.removesuffix('.safetensors')}.safetensors"
        assert export_path(name, "checkpoints") == expected

    def test_through_a_link_that_leads_out_is_refused(self, folders):
        base = folders / "output" / "checkpoints"
        base.mkdir(parents=True)
        (base / "out").symlink_to(folders, target_is_directory=True)
        with pytest.raises(ValueError, match="leads out of ComfyUI's output folder"):
            export_path("out/a", "checkpoints")

    def test_by_default_is_the_sources(self):
        assert default_name("sub/my model!.safetensors", "scaled") == "my_model__hswq_scaled"
        for odd in ("...", "con.safetensors", "-x.ckpt", "模" * 300):
            export_path(default_name(odd, "v2"), "checkpoints")


class TestRefused:
    def test_a_name_that_is_taken(self, recorded, folders):
        target = target_of(wanted())
        target.parent.mkdir(parents=True)
        target.write_bytes(b"precious")
        with pytest.raises(ExportError, match=r"exported\.safetensors is there already"):
            export(recorded, target, wanted())
        assert target.read_bytes() == b"precious"
        assert leftovers(folders) == [target]
        export(recorded, target, wanted(), overwrite=True)
        assert len(load_file(target)) > 500

    def test_but_not_the_very_same_export(self, recorded):
        target, _ = written(recorded, wanted())
        before = target.stat()
        again = export(recorded, target, wanted())
        assert again.plan is None
        assert target.stat().st_mtime_ns == before.st_mtime_ns
        with pytest.raises(ExportError, match="is there already"):
            export(recorded, target, wanted(keep_ratio=0.5))
        export(recorded, target, wanted(), overwrite=True)
        assert target.stat().st_ino != before.st_ino

    @pytest.mark.parametrize("where", ["first", "middle", "last"])
    def test_a_damaged_one(self, recorded, where):
        target, _ = written(recorded, wanted())
        content = bytearray(target.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        at = {"first": start, "middle": (start + len(content)) // 2, "last": len(content) - 1}
        damaged = slice(at[where], at[where] + 1000)
        content[damaged] = bytes(byte ^ 0xFF for byte in content[damaged])
        target.write_bytes(content)
        with pytest.raises(ModelFileError, match=r"exported\.safetensors is there .* damaged"):
            export(recorded, target, wanted())
        assert target.read_bytes() == content
        whole = export(recorded, target, wanted(), overwrite=True)
        assert whole.plan is not None
        assert export(recorded, target, wanted()).plan is None

    def test_one_that_is_interrupted_while_it_is_compared(self, recorded):
        target, _ = written(recorded, wanted())
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            export(recorded, target, wanted())

    def test_a_digest_is_of_the_very_bytes(self, recorded):
        target, _ = written(recorded, wanted())
        content = target.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        with safe_open(target, "pt") as file:
            assert file.metadata()[DIGEST] == hashlib.sha256(content[start:]).hexdigest()

    def test_the_source_itself(self, statistics):
        path = make_checkpoint(export_path("mine", "checkpoints"))
        record(str(path), statistics)
        before = path.read_bytes()
        with pytest.raises(ExportError, match="is the source itself"):
            export(str(path), path, wanted(), overwrite=True)
        assert path.read_bytes() == before

    def test_a_file_that_is_quantized_already(self, recorded):
        path, _ = written(recorded, wanted())
        with pytest.raises(ModelFileError, match=r"exported\.safetensors is quantized already"):
            export(str(path), target_of(wanted(), "b"), wanted())

    def test_a_file_without_statistics(self, checkpoint, folders):
        with pytest.raises(ValueError, match="has 0 of 32 images that HSWQ needs"):
            export(str(checkpoint), target_of(wanted()), wanted())
        assert not leftovers(folders)

    def test_a_file_that_is_no_model(self, folders):
        path = folders / "lora.safetensors"
        save_file({"lora_up.weight": torch.ones(2, 2)}, path)
        with pytest.raises(ModelFileError, match="holds no diffusion model that ComfyUI knows"):
            export(str(path), target_of(wanted()), wanted(without=choice.QUANTIZE_UNIFORMLY))

    def test_a_key_of_the_format_that_the_file_has(self, checkpoint, statistics, folders):
        path = str(folders / "odd.safetensors")
        key = f"{PREFIX}input_blocks.1.0.in_layers.2.scale"
        save_file({**load_file(checkpoint), key: torch.ones(1)}, path)
        settings = wanted("original V2", without=choice.QUANTIZE_UNIFORMLY)
        with pytest.raises(ModelFileError, match=f"odd.safetensors has a tensor {key} already"):
            export(path, target_of(settings), settings)

    @pytest.mark.parametrize("change", [{"format": "mxfp8"}, {"without": "load in 16 bit"}])
    def test_a_setting_that_there_is_not(self, change):
        with pytest.raises(ValueError, match="must be one of"):
            wanted(**{"kind": change.pop("format", "scaled"), **change})

    def test_a_disk_that_is_too_small(self, checkpoint, folders):
        with pytest.raises(
            ExportError, match=r"a\.safetensors needs \d+ MiB of disk space, but only"
        ):
            check_target(folders / "output" / "a.safetensors", str(checkpoint), 1 << 60, False)


class TestBrokenOff:
    def test_by_a_full_disk(self, recorded, folders):
        resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
        target = target_of(wanted())
        target.parent.mkdir(parents=True)
        target.write_bytes(b"precious")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, hard))
        try:
            with pytest.raises(OSError, match=r"exported\.safetensors cannot be written: File too"):
                export(recorded, target, wanted(), overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert target.read_bytes() == b"precious"
        assert leftovers(folders) == [target]

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
    def test_by_an_interrupt(self, recorded, folders, monkeypatch, share):
        def stop(value, total, _, **__):
            if value >= share * total:
                comfy.model_management.interrupt_current_processing(True)

        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
        monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            export(recorded, target_of(wanted()), wanted())
        assert not leftovers(folders)
        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
        assert written(recorded, wanted())[0].exists()

    def test_by_statistics_of_another_model(self, checkpoint, statistics, folders):
        layers = {**statistics, "not.there": statistics["out.2"]}
        del layers["out.2"]
        record(str(checkpoint), type(statistics)(layers, {}))
        with pytest.raises(ValueError, match="the statistics belong to another model"):
            export(str(checkpoint), target_of(wanted()), wanted())
        assert not leftovers(folders)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it")
class TestLeftovers:
    """A file of the model's size that nobody sees."""

    def left(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ".x.safetensors.0123abcd.tmp"
        path.write_bytes(b"half a model")
        os.utime(path, (1, 1))
        return path

    def test_of_killed_exports_go_with_the_next(self, recorded):
        target = target_of(wanted())
        left = self.left(target.parent)
        export(recorded, target, wanted())
        assert not left.exists()

    def test_anywhere_go_at_the_start(self, folders):
        output = folders / "output"
        places = [output / "checkpoints", output / "diffusion_models" / "deep" / "er",
                  folders / "models" / "hswq", folders / "models" / "hswq" / "plans",
                  folders / "models" / "hswq" / "refined"]  # fmt: skip
        found = [self.left(place) for place in places]
        others = self.left(output / "theirs")
        sweep_folders()
        assert not any(path.exists() for path in found)
        assert others.exists()


class TestMemory:
    def test_is_for_one_tensor(self, folders):
        """Half a GiB of text encoder; its tensors have 32 MiB."""
        path = folders / "large.safetensors"
        tensors = {k: v.half() for k, v in checkpoint_tensors().items()}
        filler = {f"conditioner.filler.{i}": (torch.float16, (16 << 20,)) for i in range(16)}
        facts = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        layout = lay_out({**facts, **filler}, {})
        with open(path, "xb") as file:
            layout.begin(file)
            for name, tensor in tensors.items():
                layout.write(file, name, tensor)
            file.truncate(layout.size)
        settings = wanted(without=choice.QUANTIZE_UNIFORMLY)
        export(str(path), target_of(settings, "warm"), settings)
        with PeakMemory() as memory:
            export(str(path), target_of(settings), settings)
        assert target_of(settings).stat().st_size > 512 << 20
        assert memory.bytes < 64 << 20
        assert weight(load_checkpoint(str(target_of(settings)), None)[0], "out.2").isfinite().all()
