"""The export: the loader's own weights as a file that stock ComfyUI and our loader read."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from itertools import pairwise
from pathlib import Path

import comfy.sd
import pytest
import torch
from bench import common
from harness.exports import SAMPLES, decisions, identical, record, target_of, wanted, written
from harness.inprocess import alike, distance, held, parts, same, sample
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint, load_diffusion_model
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.layer_formats import FILE_FORMATS
from hswq.loader.files.safetensors import read_header
from hswq.loader.jobs import choice
from hswq.loader.jobs.export import export
from hswq.quant import INT8, Plan, QuantizeSettings
from nodes import CheckpointLoaderSimple, UNETLoader
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy.checkpoint import make_checkpoint, make_diffusion_model

pytestmark = pytest.mark.usefixtures("folders")

PREFIX = "model.diffusion_model."
STOCK_READS = ("compatible", "scaled")
KINDS = pytest.mark.parametrize("kind", FILE_FORMATS)
WHAT = pytest.mark.parametrize("model_only", [False, True], ids=["full", "model only"])


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def loaded_by_us(path: str, plan: Plan):
    """Return the MODEL that our loader makes of a 16-bit file."""
    return load_checkpoint(path, plan, only_model=True)[0]


@pytest.fixture(scope="module")
def before() -> dict[tuple[str, bool], tuple[Path, Plan]]:
    """Where the toy was exported before, by how."""
    return {}


@pytest.fixture
def exported(recorded, before, kind, model_only) -> tuple[Path, Plan]:
    """The toy's export, in ComfyUI's folders, and its Plan. Each is written once for all tests."""
    settings = wanted(kind, model_only=model_only)
    if (kind, model_only) not in before:
        before[kind, model_only] = written(recorded, settings)
    path, plan = before[kind, model_only]
    target = target_of(settings)
    if target != path:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return target, plan


class TestFile:
    @KINDS
    @WHAT
    def test_has_the_loaders_weights_and_all_else_as_it_was(
        self, recorded, exported, plans, kind, model_only
    ):
        path, plan = exported
        its_format = FILE_FORMATS[kind].number_format
        assert plan.number_format == its_format
        if its_format is not INT8:
            assert plan == plans[its_format.scaled]
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
                    assert value.equal(ours[f"{name}.weight"][1].reshape(shape))
                else:
                    assert json.loads(bytes(value.tolist()))["full_precision_matrix_mult"]
        assert found > 100
        assert after.keys() == before.keys()
        assert all(identical(after[key], before[key]) for key in before)

    @KINDS
    @WHAT
    def test_gives_our_loader_its_own_weights(self, recorded, exported, kind, model_only):
        path, plan = exported
        if model_only:
            stored = load_diffusion_model(str(path), None)
        else:
            stored = load_checkpoint(str(path), None, only_model=True)[0]
        expected = loaded_by_us(recorded, plan)
        ours = held(expected)
        other = same(held(stored), ours)
        convs = [f"{name}.weight" for name in plan.quantized if ours[f"{name}.weight"][0].ndim == 4]
        assert sorted(other) == ([] if FILE_FORMATS[kind].conv is not None else sorted(convs))
        assert distance(sample(stored), sample(expected)) < (0.5 if other else 1e-9)

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
        assert len(found.pop("hswq.sha256")) == 64
        layers = int(found.pop("hswq.quantized_layers")), int(found.pop("hswq.kept_layers"))
        assert sum(layers) == len(plan.layers)
        assert found.pop("hswq.plan").startswith(fingerprint(path)[:16])
        assert found == {
            "format": "pt", "modelspec.title": "Mine", "hswq.version": "1",
            "hswq.format": "scaled", "hswq.mode": "scaled", "hswq.keep_ratio": "0.5",
            "hswq.source": "mine.safetensors", "hswq.source_fingerprint": fingerprint(path),
            "hswq.statistics": "auto", "hswq.samples": str(SAMPLES), "hswq.dtype": "F16",
            "hswq.readers": "ComfyUI's own loaders, and HSWQ's", "hswq.also_keep": "",
            "hswq.rounding": "nearest",
        }  # fmt: skip

    def test_searches_the_loaders_plan_and_keeps_it(self, checkpoint, statistics, plans):
        path = str(checkpoint)
        record(path, statistics)
        first, plan = written(path, wanted())
        loader = load_checkpoint(path, common.planner(statistics), only_model=True)[0]
        found = [decisions(one) for one in (plan, plans[True], loader.get_attachment(ATTACHMENT))]
        assert found[0] == found[1] == found[2]
        settings = QuantizeSettings()
        kept = choice.choose(choice.AUTO, fingerprint(path), "", settings, choice.FAIL)
        assert kept.decider.plan == plan
        again = target_of(wanted(), "again")
        assert export(path, again, wanted()).plan == kept.decider.plan
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

    @pytest.mark.parametrize("keep_ratio", [0.0, 0.25])
    def test_of_several_dtypes(self, checkpoint, statistics, folders, keep_ratio):
        """What is left in 16 bit does not say what the model is in."""
        tensors = {
            name: tensor.bfloat16() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
            for name, tensor in load_file(checkpoint).items()
        }
        path = str(folders / "mixed.safetensors")
        save_file(tensors, path)
        record(path, statistics)
        target, plan = written(path, wanted("scaled, convs too", keep_ratio=keep_ratio))
        assert {tensor.dtype for tensor in tensors.values()} >= {torch.bfloat16, torch.float16}
        stored = load_checkpoint(str(target), None, only_model=True)[0]
        ours = loaded_by_us(path, plan)
        assert not same(held(stored), held(ours))
        networks = (one.model.diffusion_model for one in (stored, ours))
        assert len({part.dtype for one in networks for part in one.parameters()}) == 1

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
    def test_reads_it_and_keeps_16_bit_layers(self, recorded, exported, caplog, model_only):
        path, plan = exported
        with caplog.at_level(logging.INFO):
            stock = self.load(path, model_only)
        assert "Using mixed precision operations" in caplog.messages
        complaints = ("unet unexpected", "unet missing", "left over keys in diffusion model")
        assert not [line for line in caplog.messages if line.startswith(complaints)]
        before, after, prefix = load_file(recorded), load_file(path), "" if model_only else PREFIX
        network = stock.model.diffusion_model
        for name in plan.layers:
            held_in = parts(network.get_submodule(name).weight.detach())
            data, *scale = (part.cpu() for part in held_in)
            in_file = after[f"{prefix}{name}.weight"]
            if in_file.dtype.itemsize > 1:
                assert data.dtype.itemsize >= 2
                assert torch.equal(data.float(), before[f"{PREFIX}{name}.weight"].float())
            elif in_file.ndim == 2:
                assert identical(data, in_file)
                assert identical(scale[0], after[f"{prefix}{name}.weight_scale"])
            else:
                assert torch.equal(data.float(), in_file.float())
        assert len(plan.kept) > 50

    @WHAT
    def test_samples_as_our_loader_does(self, exported, model_only):
        path, _ = exported
        stock = self.load(path, model_only)
        ours = load_diffusion_model if model_only else load_checkpoint
        ours = ours(str(path), None)
        ours = ours if model_only else ours[0]
        # The same bytes in the same products; on a GPU, stock multiplies its scale in 16 bit.
        assert alike(sample(stock), sample(ours))
