"""LoRA on FP8: the error is that of quantizing the merged weights, on trained ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import comfy.model_management as memory
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness.inprocess import conditioning, distance, held, load, same, sample, unload, weight
from helpers import make_planner
from hswq.calibration import DualMonitor, Statistics
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.converter import convert
from hswq.loader.engine.loading import load_checkpoint
from hswq.quant import Planner
from safetensors.torch import load_file, save_file
from toy.checkpoint import make_trained_checkpoint

PREFIX = "model.diffusion_model."
RANK = 8


class Trained(NamedTuple):
    """The trained toy: its file, the 16-bit MODEL and its statistics."""

    path: str
    model: ModelPatcher
    statistics: Statistics


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    path = str(make_trained_checkpoint(tmp_path_factory.mktemp("trained") / "toy.safetensors"))
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(
            path, output_vae=False, output_clip=False, model_options={"dtype": torch.float16}
        )[0]
        with DualMonitor(model.model.diffusion_model) as monitor:
            sample(model, steps=4, cfg=4.0)
    return Trained(path, model, monitor.statistics())


@pytest.fixture(scope="module")
def loaded(trained) -> dict[bool, ModelPatcher]:
    """The toy quantized from its file, in both modes."""
    with torch.inference_mode():
        return {
            scaled: load_checkpoint(trained.path, planner(trained, scaled), only_model=True)[0]
            for scaled in (True, False)
        }


def planner(trained: Trained, scaled: bool) -> Planner:
    return make_planner(trained.statistics, 0.25, scaled=scaled)


def lora(trained: Trained, kind: str = "lora") -> dict[str, torch.Tensor]:
    """Return a LoRA (or a full difference) whose change is as large as each layer's weights."""
    tensors = {}
    for number, (name, value) in enumerate(load_file(trained.path).items()):
        layer = name.removeprefix(PREFIX).removesuffix(".weight")
        if layer not in trained.statistics or not name.endswith(".weight"):
            continue
        generator = torch.Generator().manual_seed(number)
        prefix = "lora_unet_" + layer.replace(".", "_")
        size = value.float().std()
        if kind == "diff":
            tensors[f"{prefix}.diff"] = torch.randn(value.shape, generator=generator) * size
            continue
        up = torch.randn(value.shape[0], RANK, *[1] * (value.ndim - 2), generator=generator)
        down = torch.randn(RANK, *value.shape[1:], generator=generator) * size / RANK**0.5
        tensors |= {f"{prefix}.lora_up.weight": up, f"{prefix}.lora_down.weight": down}
    return tensors


def patched(model: ModelPatcher, file: dict[str, torch.Tensor], strength: float) -> ModelPatcher:
    return comfy.sd.load_lora_for_models(model, None, file, strength, 0.0)[0]


def weights(model: ModelPatcher, names: list[str]) -> dict[str, torch.Tensor]:
    """Return weights in real units, as sampling uses them."""
    load(model)
    found = {name: weight(model, name).cpu() for name in names}
    unload()
    return found


def error(trained: Trained, found: dict, exact: dict) -> float:
    """Return the weighted relative error of weights, root mean square over the layers."""
    total = 0.0
    for name, value in exact.items():
        importance = trained.statistics[name].importance.float()
        shares = importance.view(1, -1, *[1] * (value.ndim - 2))
        total += (((found[name] - value) ** 2 * shares).sum() / (value**2 * shares).sum()).item()
    return (total / len(exact)) ** 0.5


def errors(
    trained: Trained, model: ModelPatcher, file: dict, strength: float, scaled: bool, only: str = ""
) -> tuple[float, float]:
    """Return the error with a LoRA on FP8, and that of quantizing the merged weights."""
    names = [name for name in model.get_attachment(ATTACHMENT).quantized if only in name]
    with_lora = patched(trained.model, file, strength)
    exact = weights(with_lora, names)
    merged = convert(with_lora, planner(trained, scaled))
    found = (weights(one, names) for one in (patched(model, file, strength), merged))
    ours, theirs = (error(trained, values, exact) for values in found)
    return ours, theirs


def outputs(model: ModelPatcher) -> torch.Tensor:
    """Return what a few samplings of one step give."""
    found = [sample(model, conditioning(seed), batch=2) for seed in range(4)]
    unload()
    return torch.cat(found)


@pytest.fixture(params=[True, False], ids=["scaled", "compatible"])
def scaled(request, legacy) -> bool:
    """Both modes; under Dynamic VRAM, ComfyUI patches the FP8 weights by itself."""
    return request.param


class TestError:
    """Before patches went onto the originals it was up to 1.7 times as large."""

    @pytest.mark.parametrize(
        ("kind", "strength"), [("lora", 0.03), ("lora", 0.3), ("lora", 1.0), ("diff", 0.3)]
    )
    def test_of_weights_is_that_of_quantizing_the_merged_ones(
        self, trained, loaded, scaled, kind, strength
    ):
        ours, merged = errors(trained, loaded[scaled], lora(trained, kind), strength, scaled)
        assert ours < 1.03 * merged
        assert 0.02 < merged < 0.03

    def test_of_outputs_is_that_of_quantizing_the_merged_weights(self, trained, loaded, scaled):
        file = lora(trained)
        with_lora = patched(trained.model, file, 0.2)
        exact = outputs(with_lora)
        ours = distance(outputs(patched(loaded[scaled], file, 0.2)), exact)
        merged = distance(outputs(convert(with_lora, planner(trained, scaled))), exact)
        assert ours < 1.3 * merged
        assert distance(outputs(loaded[scaled]), exact) > 2 * ours


class TestOriginals:
    @pytest.fixture
    def copied(self, trained, legacy, tmp_path) -> tuple[Path, ModelPatcher]:
        """A file of its own, and the MODEL that was loaded from it."""
        path = Path(shutil.copy(trained.path, tmp_path / "copy.safetensors"))
        return path, load_checkpoint(str(path), planner(trained, True), only_model=True)[0]

    def compared(self, trained, model: ModelPatcher) -> float:
        """Return the weights' error with a LoRA, relative to that of the merged ones."""
        before = held(model)
        # A few layers tell as much as all.
        some = {key: value for key, value in lora(trained).items() if "middle_block" in key}
        ours, merged = errors(trained, model, some, 0.3, scaled=True, only="middle_block")
        assert not same(held(model), before)
        return ours / merged

    def test_without_the_file_patches_go_onto_the_fp8_weights(self, trained, copied):
        path, model = copied
        path.unlink()
        assert 1.2 < self.compared(trained, model) < 2

    @pytest.mark.parametrize("damage", ["other weights", "cut off", "no model"])
    def test_of_another_file_in_its_place_are_not_taken(self, trained, copied, damage):
        path, model = copied
        if damage == "other weights":
            tensors = load_file(path)
            save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, path)
        else:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 20] if damage == "cut off" else b"no")
        assert 1.2 < self.compared(trained, model) < 2

    def test_are_taken_once_the_file_is_back(self, trained, copied):
        path, model = copied
        moved = path.rename(path.with_name("moved.safetensors"))
        assert self.compared(trained, model) > 1.2
        moved.rename(path)
        assert self.compared(trained, model) < 1.03

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_are_those_of_weights_without_a_patch_only(self, trained, loaded, legacy, dtype):
        """In each dtype that LoRAs are computed in; doubling a weight need not change a byte."""
        model = loaded[True]
        name = next(iter(model.get_attachment(ATTACHMENT).quantized))
        layer = model.model.diffusion_model.get_submodule(name)
        original = load_file(trained.path)[f"{PREFIX}{name}.weight"]
        value = layer.weight.to(dtype)
        assert layer.convert_weight(value).equal(original.to(value.device, dtype))
        patch = layer.set_weight(2 * original.to(value.device, dtype), return_weight=True)
        assert layer.convert_weight(patch.to(dtype)).equal(patch.to(dtype).dequantize())

    @pytest.mark.parametrize("failed", [False, True], ids=["", "after a LoRA that failed"])
    def test_are_not_read_for_hooks_in_every_step(self, loaded, legacy, monkeypatch, failed):
        """For which ComfyUI asks in FP32, also where it computes other LoRAs in FP16."""
        model = loaded[True]
        name = next(iter(model.get_attachment(ATTACHMENT).quantized))
        layer = model.model.diffusion_model.get_submodule(name)
        device = layer.weight.device
        monkeypatch.setitem(memory.LORA_COMPUTE_DTYPES, device, torch.float16)
        if failed:
            broken = model.clone()
            key = f"diffusion_model.{name}.weight"
            broken.add_patches({key: ("set", (torch.zeros(2, 3, 5),))})
            with pytest.raises(RuntimeError):
                broken.patch_weight_to_device(key, device)
            broken.unpatch_model()
        asked = []

        def ask(*_):
            for dtype in (torch.float32, torch.float16):
                value = layer.weight.to(dtype)
                asked.append(layer.convert_weight(value).equal(value.dequantize()))

        ask()  # as merges do
        sample(model, callback=ask)
        assert asked == [False, False, True, False]

    def test_are_of_no_use_to_a_pickled_file(self, trained, legacy, tmp_path):
        path = str(tmp_path / "toy.ckpt")
        torch.save({"state_dict": load_file(trained.path)}, path)
        model = load_checkpoint(path, planner(trained, True), only_model=True)[0]
        assert 1.2 < self.compared(trained, model) < 2
