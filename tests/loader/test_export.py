"""The export: the loader's own weights as a file that stock ComfyUI and our loader read."""

from __future__ import annotations

import json
import logging
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from bench import common
from harness.inprocess import distance, held, parts, same, sample, weight
from hswq.loader import choice, store
from hswq.loader.export import ExportError, ExportSettings, _check_target, export
from hswq.loader.exportpath import default_name, export_path
from hswq.loader.formats import FILE_FORMATS
from hswq.loader.layers import layers_of
from hswq.loader.loading import ATTACHMENT, load_checkpoint, load_diffusion_model
from hswq.loader.modelfile import ModelFileError, fingerprint, load_tensors, read_header
from hswq.loader.quantizer import QuantizeSettings
from hswq.loader.tensorfile import lay_out
from hswq.quant import Plan, make_plan
from nodes import CheckpointLoaderSimple, UNETLoader
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy.checkpoint import checkpoint_tensors, make_checkpoint, make_diffusion_model

PREFIX = "model.diffusion_model."
SAMPLES = 40
STOCK_READS = ("compatible", "scaled")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty models folder, and an output folder whose models ComfyUI offers."""
    paths = {
        "checkpoints": ([str(tmp_path / "output" / "checkpoints")], {".safetensors"}),
        "diffusion_models": ([str(tmp_path / "output" / "diffusion_models")], {".safetensors"}),
        "embeddings": ([], set()),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    store.register_folder()
    return tmp_path


@pytest.fixture(scope="session")
def plans(checkpoint, statistics) -> dict[bool, Plan]:
    """The loader's Plans of the toy, of both modes; they are searched once for all tests."""
    layers = layers_of(str(checkpoint), *load_tensors(str(checkpoint)))
    return {scaled: make_plan(layers, statistics, 0.25, scaled) for scaled in (True, False)}


@pytest.fixture
def recorded(checkpoint, statistics, plans) -> str:
    """The toy with enough recorded samples, loaded before."""
    path = str(checkpoint)
    record(path, statistics)
    for scaled, plan in plans.items():
        settings = QuantizeSettings(scaled)
        choice.choose(choice.AUTO, fingerprint(path), "", settings, choice.FAIL).keep(plan)
    return path


def record(path: str, statistics) -> None:
    delta = type(statistics)(statistics, {"samples": SAMPLES, "total_steps": 1})
    store.add_statistics(delta, fingerprint(path), store.PASSIVE_SESSION, "toy.safetensors")


def wanted(kind: str = "scaled", **changes) -> ExportSettings:
    return ExportSettings(
        **{
            "format": kind, "statistics": choice.AUTO, "keep_ratio": 0.25,
            "without": choice.FAIL, "model_only": False, **changes,
        }
    )  # fmt: skip


def target_of(settings: ExportSettings, name: str = "exported") -> Path:
    return export_path(name, "diffusion_models" if settings.model_only else "checkpoints")


def written(path: str, settings: ExportSettings) -> tuple[Path, Plan]:
    target = target_of(settings)
    return target, export(path, target, settings).plan


def leftovers(folder: Path) -> list[Path]:
    return [path for path in (folder / "output").rglob("*") if path.is_file()]


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and flat[0].equal(flat[1])


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


KINDS = pytest.mark.parametrize("kind", FILE_FORMATS)
WHAT = pytest.mark.parametrize("model_only", [False, True], ids=["full", "model only"])


def loaded_by_us(path: str, plan: Plan):
    """Return the MODEL that our loader makes of a 16-bit file."""
    return load_checkpoint(path, plan, only_model=True)[0]


class TestFile:
    @KINDS
    @WHAT
    def test_has_the_loaders_weights_and_all_else_as_it_was(
        self, recorded, plans, kind, model_only
    ):
        path, plan = written(recorded, wanted(kind, model_only=model_only))
        assert plan == plans[FILE_FORMATS[kind].scaled]
        ours = held(loaded_by_us(recorded, plan))
        before, after = load_file(recorded), load_file(path)
        prefix = "" if model_only else PREFIX
        if model_only:
            before = {k.removeprefix(PREFIX): v for k, v in before.items() if PREFIX in k}
        found = 0
        for name in plan.quantized:
            key = f"{prefix}{name}."
            data = after.pop(f"{key}weight")
            source = before.pop(f"{key}weight")
            if data.ndim == 4 and FILE_FORMATS[kind].conv is None:
                assert identical(data, source)
                continue
            found += 1
            assert identical(data, ours[f"{name}.weight"][0])
            for extra, (dtype, shape) in FILE_FORMATS[kind].beside(data).items():
                value = after.pop(key + extra)
                assert (value.dtype, tuple(value.shape)) == (dtype, shape)
                if dtype is torch.float32:
                    assert value.item() == ours[f"{name}.weight"][1].item()
                else:
                    assert json.loads(bytes(value.tolist()))["full_precision_matrix_mult"]
        assert found > 100
        assert after.keys() == before.keys()
        assert all(identical(after[key], before[key]) for key in before)

    @KINDS
    @WHAT
    def test_gives_our_loader_its_own_weights(self, recorded, kind, model_only):
        path, plan = written(recorded, wanted(kind, model_only=model_only))
        if model_only:
            stored = load_diffusion_model(str(path), None)
        else:
            stored = load_checkpoint(str(path), None, only_model=True)[0]
        expected = loaded_by_us(recorded, plan)
        ours = held(expected)
        other = same(held(stored), ours)
        convs = [f"{name}.weight" for name in plan.quantized if ours[f"{name}.weight"][0].ndim == 4]
        assert sorted(other) == (sorted(convs) if kind == "scaled" else [])
        assert distance(sample(stored), sample(expected)) < (0.2 if other else 1e-9)

    def test_is_what_safetensors_prescribes(self, recorded):
        path, _ = written(recorded, wanted())
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        assert length % 8 == 0
        entries = sorted(read_header(str(path)).values(), key=lambda entry: entry.start)
        assert entries[0].start == 8 + length
        assert all(a.end == b.start for a, b in pairwise(entries))
        assert entries[-1].end == len(data)
        items = {"F32": 4, "F16": 2, "I64": 8}
        assert all(entry.start % items.get(entry.dtype, 1) == 0 for entry in entries)

    def test_says_what_it_is(self, checkpoint, statistics, folders):
        tensors = load_file(checkpoint)
        path = str(folders / "mine.safetensors")
        own = {"modelspec.title": "Mine", "modelspec.hash_sha256": "0xab"}
        save_file(tensors, path, metadata=own)
        record(path, statistics)
        target, plan = written(path, wanted(keep_ratio=0.5))
        found = metadata_of(target)
        layers = int(found.pop("hswq.quantized_layers")), int(found.pop("hswq.kept_layers"))
        assert sum(layers) == len(plan.layers)
        assert len(found.pop("hswq.plan")) == 40
        assert found == {
            "format": "pt", "modelspec.title": "Mine", "hswq.version": "1",
            "hswq.format": "scaled", "hswq.mode": "scaled", "hswq.keep_ratio": "0.5",
            "hswq.source": "mine.safetensors", "hswq.source_fingerprint": fingerprint(path),
            "hswq.statistics": "auto", "hswq.samples": str(SAMPLES),
        }  # fmt: skip

    def test_searches_the_loaders_plan_and_keeps_it(self, checkpoint, statistics, plans):
        path = str(checkpoint)
        record(path, statistics)
        first, plan = written(path, wanted())
        loader = load_checkpoint(path, common.planner(statistics), only_model=True)[0]
        assert plan == plans[True] == loader.get_attachment(ATTACHMENT)
        assert list(plan.layers) == list(loader.get_attachment(ATTACHMENT).layers)
        settings = QuantizeSettings()
        kept = choice.choose(choice.AUTO, fingerprint(path), "", settings, choice.FAIL)
        assert kept.source == plan
        again = target_of(wanted(), "again")
        assert export(path, again, wanted()).plan == kept.source
        assert again.read_bytes() == first.read_bytes()

    def test_without_statistics_quantizes_everything_where_told_so(self, checkpoint):
        settings = wanted("compatible", without=choice.QUANTIZE_UNIFORMLY)
        path, plan = written(str(checkpoint), settings)
        assert not plan.kept
        assert metadata_of(path)["hswq.statistics"] == "none"


class TestSources:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", ["scaled, convs too", "compatible"])
    def test_of_another_dtype(self, statistics, folders, dtype, kind):
        path = str(make_checkpoint(folders / "other.safetensors", dtype=dtype))
        record(path, statistics)
        target, plan = written(path, wanted(kind))
        kept = {load_file(target)[f"{PREFIX}{name}.weight"].dtype for name in plan.kept}
        assert kept == {torch.float16 if dtype is torch.float32 else dtype}
        stored = load_checkpoint(str(target), None, only_model=True)[0]
        assert not same(held(stored), held(loaded_by_us(path, plan)))

    def test_a_pickled_one(self, recorded, folders):
        path = str(folders / "toy.ckpt")
        torch.save({"state_dict": load_file(recorded), "epoch": 3}, path)
        pickled, mapped = target_of(wanted()), target_of(wanted(), "mapped")
        export(path, pickled, wanted())
        export(recorded, mapped, wanted())
        a, b = load_file(pickled), load_file(mapped)
        assert a.keys() == b.keys()
        assert all(identical(a[key], b[key]) for key in a)

    @WHAT
    def test_a_diffusion_model_alone(self, recorded, folders, model_only):
        path = str(make_diffusion_model(folders / "unet.safetensors"))
        assert fingerprint(path) == fingerprint(recorded)
        target, plan = written(path, wanted(model_only=model_only))
        assert all(f"{name}.weight" in load_file(target) for name in plan.layers)

    def test_keeps_how_it_is_sampled(self, recorded, folders):
        path = str(folders / "v.safetensors")
        marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
        save_file({**load_file(recorded), **marks}, path)
        model = comfy.sd.load_diffusion_model(
            str(written(path, wanted("compatible", model_only=True))[0])
        ).model
        assert model.model_type.name == "V_PREDICTION"
        assert model.model_config.sampling_settings["zsnr"]


@pytest.mark.parametrize("kind", STOCK_READS)
class TestStock:
    def load(self, path: Path, model_only: bool):
        if model_only:
            return UNETLoader().load_unet(path.name, "default")[0]
        return CheckpointLoaderSimple().load_checkpoint(path.name)[0]

    @WHAT
    def test_reads_it_and_keeps_16_bit_layers(self, recorded, caplog, kind, model_only):
        path, plan = written(recorded, wanted(kind, model_only=model_only))
        with caplog.at_level(logging.INFO):
            stock = self.load(path, model_only)
        assert "Using mixed precision operations" in caplog.messages
        complaints = ("unet unexpected", "unet missing", "left over keys in diffusion model")
        assert not [line for line in caplog.messages if line.startswith(complaints)]
        before, after, prefix = load_file(recorded), load_file(path), "" if model_only else PREFIX
        network = stock.model.diffusion_model
        for name in plan.layers:
            data, *scale = parts(network.get_submodule(name).weight.detach())
            in_file = after[f"{prefix}{name}.weight"]
            if in_file.dtype.itemsize > 1:
                assert data.dtype.itemsize >= 2
                assert torch.equal(data.float(), before[f"{PREFIX}{name}.weight"].float())
            elif in_file.ndim == 2:
                assert identical(data.cpu(), in_file)
                assert identical(scale[0].cpu(), after[f"{prefix}{name}.weight_scale"])
            else:
                assert torch.equal(data.float(), in_file.float())
        assert len(plan.kept) > 50

    @WHAT
    def test_samples_as_our_loader_does(self, recorded, kind, model_only):
        path, _ = written(recorded, wanted(kind, model_only=model_only))
        stock = self.load(path, model_only)
        ours = load_diffusion_model if model_only else load_checkpoint
        ours = ours(str(path), None)
        ours = ours if model_only else ours[0]
        apart = distance(sample(stock), sample(ours))
        # The same bytes in the same products; on a GPU, stock multiplies its scale in 16 bit.
        assert apart == 0 if stock.load_device.type == "cpu" else apart < 0.01


class TestName:
    @pytest.mark.parametrize(
        "name",
        [
            "../evil", "a/../../b", "/etc/passwd", "..", ".", "", "a//b", "a/", ".hidden", "a\0b",
            "a\\b", "C:evil", "a\nb", "con", "NUL.txt", "sub/com1", "lpt9 .x", "trailing.",
            "trailing ", "-rf", "a" * 201, "\ud800", "a*b", "$(x)", "..\\evil", "~/x", None, 3,
            "a/b.safetensors/../../../c",
        ],
    )  # fmt: skip
    def test_that_is_unsafe_is_refused(self, name):
        with pytest.raises(ValueError, match="the filename must be letters"):
            export_path(name, "checkpoints")

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
        with pytest.raises(ValueError, match="has 0 of 32 samples that HSWQ needs"):
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
        with pytest.raises(ModelFileError, match=f"odd.safetensors has a {key} of its own"):
            export(path, target_of(settings), settings)

    @pytest.mark.parametrize("change", [{"format": "mxfp8"}, {"without": "load in 16 bit"}])
    def test_a_setting_that_there_is_not(self, change):
        with pytest.raises(ValueError, match="expected one of"):
            wanted(**{"kind": change.pop("format", "scaled"), **change})

    def test_a_disk_that_is_too_small(self, checkpoint, folders):
        with pytest.raises(ExportError, match=r"a\.safetensors needs \d+ MiB of disk space, and"):
            _check_target(folders / "output" / "a.safetensors", str(checkpoint), 1 << 60, False)


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
        record(str(checkpoint), type(statistics)(layers, {}))
        with pytest.raises(ValueError, match="the statistics belong to another model"):
            export(str(checkpoint), target_of(wanted()), wanted())
        assert not leftovers(folders)


class PeakAnonymous:
    """Growth of this process's anonymous memory in a block, in bytes."""

    def __enter__(self):
        self._start = self.peak = self._now()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._running = False
        self._thread.join()
        self.peak -= self._start

    def _watch(self):
        while self._running:
            self.peak = max(self.peak, self._now())
            time.sleep(0.001)

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) << 10
        return pytest.skip("this system does not tell its processes' memory")


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
        with PeakAnonymous() as memory:
            export(str(path), target_of(settings), settings)
        assert target_of(settings).stat().st_size > 512 << 20
        assert memory.peak < 64 << 20
        assert weight(load_checkpoint(str(target_of(settings)), None)[0], "out.2").isfinite().all()
