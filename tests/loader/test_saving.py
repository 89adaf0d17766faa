"""CheckpointSave and ModelSave of a quantized model: 16-bit files that stock ComfyUI loads."""

from __future__ import annotations

import copy
from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_merging import CheckpointSave, ModelSave
from harness.inprocess import (
    distance,
    held,
    load,
    load_partly,
    parts,
    patched,
    same,
    sample,
    unload,
    weight,
)
from harness.patches import patch_file
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.converter import convert
from hswq.loader.engine.loading import load_checkpoint
from safetensors.torch import load_file

PREFIX = "model.diffusion_model."


def newest_file(folder: str) -> Path:
    files = Path(folder_paths.get_output_directory(), folder).glob("*.safetensors")
    return max(files, key=lambda path: path.stat().st_mtime_ns)


def saved(patcher: ModelPatcher, name: str) -> dict[str, torch.Tensor]:
    """Return what the node "Save Model" writes, by the names of the diffusion model."""
    ModelSave().save(patcher, f"saved/{name}")
    return own(load_file(newest_file("saved")))


def own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)
    }


def current(patcher: ModelPatcher) -> dict[str, torch.Tensor]:
    """Return a model's weights as they are now, in real units and its 16-bit dtype."""
    dtype = patcher.model.get_dtype()
    return {
        name: (data.float() * scale[0]).to(dtype) if scale else data
        for name, (data, *scale) in held(patcher).items()
    }


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name in a.keys() | b.keys()
        if name not in a or name not in b or a[name].dtype != b[name].dtype
        or not a[name].equal(b[name])
    ]  # fmt: skip


def _partly_unloaded(patcher: ModelPatcher) -> None:
    load(patcher).partially_unload(patcher.offload_device, patcher.model_size() / 2)


PLACES = {
    "loaded": load,
    "half loaded": load_partly,
    "offloaded": lambda patcher: load_partly(patcher, 0.01),
    "half unloaded": _partly_unloaded,
}


@pytest.fixture
def lora(models) -> ModelPatcher:
    """The quantized model with a LoRA."""
    return patched(models.quantized, patch_file("LoRA"))


class TestFile:
    def test_holds_the_dequantized_weights(self, models):
        assert not differing(saved(models.quantized, "plain"), current(models.quantized))

    def test_is_loaded_by_stock_comfyui(self, models, legacy, checkpoint):
        """Under Dynamic VRAM ComfyUI 0.30.0 cannot save SDXL's CLIP, of 16-bit models neither."""
        _, clip, vae = load_checkpoint(str(checkpoint), models.quantized.get_attachment(ATTACHMENT))
        latent = sample(models.quantized)
        CheckpointSave().save(models.quantized, clip, vae, "saved/checkpoint")
        path = newest_file("saved")
        stock, its_clip, its_vae, _ = comfy.sd.load_checkpoint_guess_config(str(path))
        layers = models.quantized.get_attachment(ATTACHMENT).layers
        for name in layers:
            assert weight(stock, name).equal(weight(models.quantized, name).half().float()), name
        assert distance(sample(stock), latent) < 0.01
        before, after = load_file(checkpoint), load_file(path)
        others = [key for key in before if not key.startswith(PREFIX)]
        # As ComfyUI holds them: on a GPU its VAE is BF16.
        assert all(after[k].equal(before[k].to(after[k].dtype)) for k in others if k in after)
        assert its_clip is not None
        assert its_vae is not None

    def test_of_the_model_alone_is_a_diffusion_model(self, models):
        latent = sample(models.quantized)
        ModelSave().save(models.quantized, "saved/model")
        stock = comfy.sd.load_diffusion_model(str(newest_file("saved")))
        assert distance(sample(stock), latent) < 0.01

    def test_leaves_the_model_as_it_was(self, models):
        before, latent = held(models.quantized), sample(models.quantized)
        saved(models.quantized, "unchanged")
        assert sample(models.quantized).equal(latent)
        unload()
        assert not same(held(models.quantized), before)

    def test_can_be_quantized_again(self, models):
        """Nothing of the FP8 format is in it."""
        plan = models.quantized.get_attachment(ATTACHMENT)
        ModelSave().save(models.quantized, "saved/again")
        again = load_checkpoint(str(newest_file("saved")), plan, only_model=True)[0]
        assert sample(again).equal(sample(models.quantized))

    def test_of_a_converted_model_holds_its_weights(self, models):
        plan = models.quantized.get_attachment(ATTACHMENT)
        converted = convert(models.sixteen_bit, plan)
        assert not differing(saved(converted, "converted"), current(converted))


class TestLora:
    """Saved with a LoRA, the weights are those that sampling with it uses."""

    def test_is_in_the_file(self, models, legacy, lora):
        tensors = saved(lora, "lora")
        assert not differing(tensors, current(lora))
        unload()
        assert len(differing(tensors, current(lora))) > 80

    @pytest.mark.parametrize("place", PLACES)
    def test_is_in_the_file_wherever_the_weights_are(self, legacy, lora, place, tmp_path):
        """The same file, whether a layer is on the GPU and patched, or offloaded with its patch."""
        everywhere = saved(lora, "everywhere")
        unload()
        PLACES[place](lora)
        comfy.utils.save_torch_file(lora.state_dict_for_saving(), tmp_path / "x.safetensors")
        assert not differing(own(load_file(tmp_path / "x.safetensors")), everywhere)

    def test_has_its_effect_when_stock_comfyui_loads_the_file(self, models, legacy, lora):
        """Under Dynamic VRAM ComfyUI 0.30.0 saves kept layers below 16 KB with the LoRA twice."""
        latent = sample(lora)
        ModelSave().save(lora, "saved/effect")
        stock = comfy.sd.load_diffusion_model(str(newest_file("saved")))
        assert distance(sample(models.quantized), latent) > 0.5
        assert distance(sample(stock), latent) < 0.1

    def test_is_not_in_a_file_of_the_model_without_it(self, models, lora):
        sample(lora)
        tensors = saved(models.quantized, "without")
        unload()
        assert not differing(tensors, current(models.quantized))


class TestStateDict:
    """As extensions use it, which save, copy or exchange a network's weights themselves."""

    @pytest.fixture(params=[True, False], ids=["scaled", "compatible"])
    def own(self, legacy, checkpoint, planner, request) -> ModelPatcher:
        """A model for the test alone."""
        return load_checkpoint(str(checkpoint), planner(scaled=request.param), only_model=True)[0]

    def test_goes_back_in(self, own):
        network, before, latent = own.model.diffusion_model, held(own), sample(own)
        network.load_state_dict(network.state_dict())
        assert not same(held(own), before)
        assert sample(own).equal(latent)

    def test_can_be_saved_and_read_without_our_code(self, own, tmp_path):
        network, before = own.model.diffusion_model, held(own)
        torch.save(network.state_dict(), tmp_path / "saved.pt")
        saved = torch.load(tmp_path / "saved.pt", weights_only=True)
        assert saved.keys() == network.state_dict().keys()
        for layer in own.get_attachment(ATTACHMENT).layers:
            value = saved[f"{layer}.weight"]
            assert value.dtype is torch.float16
            assert type(value) is torch.Tensor
            assert value.cpu().equal(weight(own, layer).half())
        network.load_state_dict(saved)
        assert not same(held(own), before)

    def test_takes_other_weights_in_its_formats(self, own):
        network, before = own.model.diffusion_model, held(own)
        other = {
            key: 3 * (value.dequantize() if len(parts(value)) > 1 else value)
            for key, value in network.state_dict().items()
        }
        network.load_state_dict(other)
        after = held(own)
        for key, expected in other.items():
            found = comfy.utils.get_attr(network, key)
            assert len(after[key]) == len(before[key])
            assert found.dtype == expected.dtype
            found = found.dequantize() if len(parts(found)) > 1 else found
            assert distance(found, expected) < 0.05, key

    def test_of_a_copy_is_its_own(self, own):
        network, before = own.model.diffusion_model, held(own)
        copied = copy.deepcopy(network)
        kinds = [(type(one), one.requires_grad) for one in network.parameters()]
        assert [(type(one), one.requires_grad) for one in copied.parameters()] == kinds
        for one, other in zip(network.parameters(), copied.parameters(), strict=True):
            for part, copied_part in zip(parts(one), parts(other), strict=True):
                assert part.dtype is copied_part.dtype
                assert part.float().equal(copied_part.float())
                assert part.data_ptr() != copied_part.data_ptr()
        with torch.no_grad():
            for value in copied.parameters():
                value.mul_(0) if len(parts(value)) == 1 else value._qdata.zero_()
        assert not same(held(own), before)
