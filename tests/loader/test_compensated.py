"""Compensated rounding, from what real samplings record to what loader and export make."""

from __future__ import annotations

import dataclasses

import comfy.model_management as memory
import comfy.sd
import folder_paths
import pytest
import torch
from harness import inprocess
from harness.inprocess import distance, held, same, unload
from harness.trained import load, sample
from hswq.calibration import monitored_layers
from hswq.loader import store
from hswq.loader.engine import loading
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint, load_diffusion_model
from hswq.loader.engine.transfer import Transfer
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.layer_formats import FILE_FORMATS
from hswq.loader.files.model_file import ModelFile
from hswq.loader.files.safetensors import read_header
from hswq.loader.host import settings
from hswq.loader.jobs import choice
from hswq.loader.jobs.also_keep import ENDS, also_kept
from hswq.loader.jobs.export import export
from hswq.loader.jobs.export_settings import ExportSettings
from hswq.loader.store import refined, refined_file
from hswq.quant import FP8_SCALED, INT8, BySensitivity, QuantizeSettings, Reason
from hswq.quant.compensate import CHECKED
from hswq.quant.formats import fp8 as formats_fp8
from nodes import CheckpointLoaderSimple, UNETLoader

NEAREST = QuantizeSettings(selection=BySensitivity(0.0))
COMPENSATED = dataclasses.replace(NEAREST, compensated=True)


class TestLoaded:
    def test_differs_in_bytes_alone(self, trained):
        one, other = load(trained, NEAREST), load(trained, COMPENSATED)
        plan, again = (each.get_attachment(ATTACHMENT) for each in (one, other))
        assert {name: layer.amax for name, layer in plan.layers.items()} == {
            name: layer.amax for name, layer in again.layers.items()
        }
        assert len(same(held(one), held(other))) > 50
        weights = monitored_layers(one.model.diffusion_model)
        for name, layer in monitored_layers(other.model.diffusion_model).items():
            assert layer.weight.params.scale.equal(weights[name].weight.params.scale)

    def test_is_closer_to_the_original(self, trained):
        """Of pictures with another seed than those recorded."""
        original = sample(trained.patcher, trained.prompt, 1000)
        nearest = distance(sample(load(trained, NEAREST), trained.prompt, 1000), original)
        compensated = distance(sample(load(trained, COMPENSATED), trained.prompt, 1000), original)
        assert compensated < 0.75 * nearest

    def test_says_what_error_to_expect(self, trained):
        plan = load(trained, COMPENSATED).get_attachment(ATTACHMENT)
        assert 0.002 < plan.output_error < 0.012
        assert load(trained, NEAREST).get_attachment(ATTACHMENT).output_error is None

    def test_loaded_again_is_the_same(self, trained):
        one, other = load(trained, COMPENSATED), load(trained, COMPENSATED)
        assert one.get_attachment(ATTACHMENT) == other.get_attachment(ATTACHMENT)
        assert not same(held(one), held(other))

    def test_a_clone_with_weights_of_its_own_is_the_same(self, trained):
        one = load(trained, COMPENSATED)
        reload, arguments = one.cached_patcher_init
        assert not same(held(reload(*arguments, disable_dynamic=True)), held(one))


class TestKept:
    def test_the_next_load_rounds_nothing(self, trained, monkeypatch):
        one = load(trained, COMPENSATED, keep=True)
        monkeypatch.setattr(formats_fp8, "quantize_compensated", None)
        assert not same(held(load(trained, COMPENSATED, keep=True)), held(one))

    @pytest.mark.parametrize("resident", [False, True])
    def test_only_what_is_damaged_is_rounded_again(self, trained, monkeypatch, resident):
        """On a GPU with room for all, only after the last layer."""
        monkeypatch.setattr(loading, "make_room", lambda *_: resident)
        if resident and not torch.cuda.is_available():
            monkeypatch.setattr(Transfer, "up", lambda _, tensor: tensor.clone())  # as to a GPU
        one = load(trained, COMPENSATED, keep=True)
        (path,) = refined.refined_folder().glob("*.safetensors")
        content = bytearray(path.read_bytes())
        places = sorted((name, entry.start) for name, entry in read_header(str(path)).items())
        for kind in (refined_file.DATA, refined_file.SCALE):  # of two layers
            content[[start for name, start in places if name.endswith(kind)][len(kind)]] ^= 1
        damaged = path.with_suffix(".damaged")
        damaged.write_bytes(content)  # not in place: the first model's weights are mapped
        damaged.replace(path)
        assert not same(held(load(trained, COMPENSATED, keep=True)), held(one))
        assert path.read_bytes() != content
        unload()

    def test_not_of_rounding_to_the_nearest(self, trained):
        before = set(refined.refined_folder().glob("*"))
        load(trained, NEAREST, keep=True)
        assert set(refined.refined_folder().glob("*")) == before


class TestLora:
    """On weights with a LoRA, rounding is compensated again, by the sketches without it."""

    def test_is_closer_to_the_16_bit_weights_with_it_than_by_nearest_rounding(
        self, trained, monkeypatch
    ):
        its, quantized = lora(trained), load(trained, COMPENSATED)
        exact, before = patched(trained.patcher, its), held(quantized)
        errors = {}
        for compensate in (True, False):
            chosen = dataclasses.replace(settings.current(), compensate_loras=compensate)
            monkeypatch.setattr(settings, "current", lambda chosen=chosen: chosen)
            errors[compensate] = output_error(trained, patched(quantized, its), exact)
        assert errors[True] < 0.6 * errors[False]
        assert not same(held(quantized), before)

    def test_without_one_is_as_exact_as_before(self, trained):
        quantized = load(trained, COMPENSATED)
        before = output_error(trained, quantized, trained.patcher)
        for name in quantized.get_attachment(ATTACHMENT).quantized:
            layer = quantized.model.diffusion_model.get_submodule(name)
            dtype = memory.lora_compute_dtype(layer.weight.device)
            layer.set_weight(layer.convert_weight(layer.weight.to(dtype)))
        assert output_error(trained, quantized, trained.patcher) < 1.1 * before


def output_error(trained, patcher, exact) -> float:
    """Return the mean relative output error of transformer blocks' layers, by their sketches."""
    sketches = store.quantizing_sketches(fingerprint(trained.path))
    names = [name for name in sketches if "transformer_blocks" in name]
    found = weights(patcher, names), weights(exact, names)
    errors = []
    for name in names:
        inputs = sketches[name].matrix[-CHECKED:].float()
        one, other = (inputs @ each[name].float().T for each in found)
        errors.append(distance(one, other))
    return sum(errors) / len(errors)


def weights(patcher, names: list[str]) -> dict[str, torch.Tensor]:
    """Return weights in real units, as sampling uses them."""
    inprocess.load(patcher)
    found = {name: inprocess.weight(patcher, name).cpu() for name in names}
    inprocess.unload()
    return found


def lora(trained) -> dict[str, torch.Tensor]:
    """Return a LoRA on the attention's and feed-forwards' layers, a fifth of their weights."""
    tensors = {}
    for name, layer in monitored_layers(trained.patcher.model.diffusion_model).items():
        if "transformer_blocks" in name:
            (rows, columns), size = layer.weight.shape, 0.2 * layer.weight.float().std().cpu()
            generator = torch.Generator().manual_seed(rows + columns)
            prefix = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{prefix}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * size
            tensors[f"{prefix}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 2
    return tensors


def patched(patcher, its):
    return comfy.sd.load_lora_for_models(patcher, None, its, 1.0, 0.0)[0]


class TestEnds:
    def test_stay_in_16_bit(self, trained):
        ends = also_kept(ENDS, ModelFile(trained.path))
        kept = dataclasses.replace(COMPENSATED, selection=BySensitivity(0.0, ends))
        plan = load(trained, kept).get_attachment(ATTACHMENT)
        assert set(plan.kept) == {"input_blocks.0.0", "out.2"}
        assert {plan.layers[name].reason for name in plan.kept} == {Reason.KEPT_BY_NAME}

    def test_by_name(self, trained):
        file = ModelFile(trained.path)
        assert also_kept("", file) == frozenset()
        assert also_kept(" last ,time_embed.0", file) == {"out.2", "time_embed.0"}
        with pytest.raises(ValueError, match="also_keep names 'middle'"):
            also_kept("first, middle", file)


class TestExport:
    def test_is_what_the_loader_has(self, trained, tmp_path):
        settings = ExportSettings(
            "scaled, convs too", choice.AUTO, 0.0, choice.FAIL, also_keep=ENDS, compensated=True
        )
        exported = export(trained.path, tmp_path / "exported.safetensors", settings)
        assert exported.plan.output_error is not None
        read = load_checkpoint(str(tmp_path / "exported.safetensors"), None, only_model=True)[0]
        ends = also_kept(ENDS, ModelFile(trained.path))
        kept = dataclasses.replace(COMPENSATED, selection=BySensitivity(0.0, ends))
        assert not same(held(read), held(load(trained, kept)))

    @pytest.mark.parametrize(
        ("kind", "model_only"), [("scaled", False), ("scaled", True), ("int8", False)]
    )
    def test_is_drawn_by_stock_comfyui_as_by_the_loader(
        self, trained, tmp_path, monkeypatch, kind, model_only
    ):
        """Of what the loader has kept, with its very bytes; convolutions are 16 bit there."""
        number_format, folder = FILE_FORMATS[kind].number_format, ([str(tmp_path)], set())
        for place in ("checkpoints", "diffusion_models"):
            monkeypatch.setitem(folder_paths.folder_names_and_paths, place, folder)
        wanted = dataclasses.replace(COMPENSATED, number_format=number_format)
        own = held(load(trained, wanted, keep=True))
        path = tmp_path / "exported.safetensors"
        settings = ExportSettings(
            kind, choice.AUTO, 0.0, choice.FAIL, model_only=model_only, compensated=True
        )
        assert export(trained.path, path, settings).plan.output_error is not None
        products = {"int8_matmul": True}  # stock rounds the inputs of INT8 layers, in any case
        if model_only:
            stock = UNETLoader().load_unet(path.name, "default")[0]
            ours = load_diffusion_model(str(path), None, **products)
        else:
            stock = CheckpointLoaderSimple().load_checkpoint(path.name)[0]
            ours = load_checkpoint(str(path), None, only_model=True, **products)[0]
        theirs = held(stock)
        quantized = [name for name, (data, *_) in theirs.items() if data.dtype.itemsize == 1]
        assert len(quantized) > 50
        assert not [
            name for name in quantized if not all(map(torch.equal, theirs[name], own[name]))
        ]
        pictures = [inprocess.sample(one, trained.prompt, steps=4) for one in (stock, ours)]
        limit = 0.02 if torch.cuda.is_available() else 1e-3 if number_format is INT8 else 0
        assert distance(*pictures) <= limit
        memory.unload_all_models()


def test_without_sketches_it_is_published_hswq(trained):
    of = fingerprint(trained.path)
    statistics = store.quantizing_statistics(of)
    planner = choice.planner_for(statistics, COMPENSATED, sketches=None)
    assert planner.number_format == FP8_SCALED
    found = load_checkpoint(trained.path, planner, only_model=True)[0]
    assert not same(held(found), held(load(trained, NEAREST)))
