"""Other patches on a model that is on the GPU: it stays there, and patching leaves no gaps."""

from __future__ import annotations

from collections.abc import Callable

import comfy.lora
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from harness.inprocess import distance, load, patched, predicted, unload
from harness.patches import patch_file


def place(patcher: ModelPatcher, key: str) -> int:
    """Return where in memory a weight is."""
    weight = comfy.utils.get_attr(patcher.model, key)
    return getattr(weight, "_qdata", weight).data_ptr()


def values_of(weight: torch.Tensor) -> torch.Tensor:
    """Return a copy of a weight's numbers, on the CPU."""
    weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    return weight.detach().to("cpu", torch.float32, copy=True)


class TestOtherPatches:
    @pytest.fixture
    def moves(self, models, legacy, monkeypatch) -> list[torch.device]:
        """Where the whole model is moved. Its offload device is another than where it samples."""
        found, move = [], models.quantized.model.to
        monkeypatch.setattr(models.quantized.model, "to", lambda to: (found.append(to), move(to)))
        if models.quantized.load_device.type == "cpu":
            monkeypatch.setattr(models.quantized, "offload_device", torch.device("cpu", 0))
        return found

    def test_find_the_model_on_the_gpu_if_it_fits(self, models, moves):
        strong, weak = (patched(models.quantized, patch_file("LoRA"), s) for s in (1.0, 0.5))
        wanted = predicted(load(weak))
        unload()
        for before in (models.quantized, strong):
            load(before)
            moves.clear()
            assert predicted(load(weak)).equal(wanted)
            assert models.quantized.offload_device not in moves
        assert not predicted(load(models.quantized)).equal(wanted)
        assert models.quantized.offload_device not in moves

    @pytest.mark.parametrize("start", ["gpu", "host"])
    def test_find_each_weights_room_taken(self, models, moves, monkeypatch, start):
        """New weights would lie between the memory that patching takes, and gaps remain."""
        model, found, calculate = models.quantized, {}, comfy.lora.calculate_weight
        if start == "host" and model.load_device.type == "cpu":
            pytest.skip("needs an NVIDIA GPU")

        def noted(patches: list, weight: torch.Tensor, key: str, *args, **kwargs) -> torch.Tensor:
            found[key] = place(model, key)
            return calculate(patches, weight, key, *args, **kwargs)

        load(model)
        if start == "host":
            unload()
        with_lora = patched(model, patch_file("LoRA"))
        before = {key: place(model, key) for key in with_lora.patches}
        monkeypatch.setattr(comfy.lora, "calculate_weight", noted)
        load(with_lora)
        assert found.keys() == before.keys()
        for key, room in found.items():
            assert place(model, key) == room != before[key]

    def test_change_no_tensor_that_a_merge_holds(self, models, moves):
        """A merged model's patches hold the weights of the model that was merged into it."""
        strong, weak = (patched(models.quantized, patch_file("LoRA"), s) for s in (1.0, 0.5))
        for before in (models.quantized, strong):
            lent = load(before).get_key_patches()
            values = {key: values_of(one[0][0]) for key, one in lent.items()}
            for later in (strong, weak, models.quantized):
                load(later)
            unload()
            for key, one in lent.items():
                assert values_of(one[0][0]).equal(values[key])

    def test_may_widen_a_weight(self, models, moves):
        key, wide = "diffusion_model.middle_block.0.in_layers.2.weight", models.quantized.clone()
        before = comfy.utils.get_attr(load(models.quantized).model, key)
        more = torch.zeros(len(before) + 16, *before.shape[1:])
        wide.add_patches({key: ("diff", (more, {"pad_weight": True}))}, 1.0)
        widened = values_of(comfy.utils.get_attr(load(wide).model, key))
        assert distance(widened[: len(before)], values_of(before)) < 0.05
        assert not widened[len(before) :].any()
        after = comfy.utils.get_attr(load(models.quantized).model, key)
        assert values_of(after).equal(values_of(before))

    def test_take_it_through_the_host_if_it_does_not_fit(self, models, moves):
        load(patched(models.quantized, patch_file("LoRA")))
        moves.clear()
        other = patched(models.quantized, patch_file("LoRA"), 0.5)
        other.partially_load(other.load_device, -0.4 * other.model_size())
        assert moves == [models.quantized.offload_device]
        assert other.loaded_size() < other.model_size()

    @pytest.mark.parametrize("where", ["weights", "object patches", "injections"])
    def test_that_fail_take_it_off_the_gpu(self, models, moves, monkeypatch, where):
        latent = predicted(load(models.quantized))
        load(patched(models.quantized, patch_file("LoRA")))
        other = patched(models.quantized, patch_file("LoRA"), 0.5)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
            if where == "weights":
                patch.setattr(comfy.lora, "calculate_weight", broken)
            else:
                patch.setattr(other, WHERE[where], broken_once())
            load(other)
        assert moves[-1] == models.quantized.offload_device
        assert predicted(load(models.quantized)).equal(latent)

    def test_take_it_through_the_host_if_a_layer_is_exchanged(self, models, moves):
        """It would stay on the GPU, in no model."""
        other = patched(models.quantized, patch_file("LoRA"))
        other.add_object_patch("diffusion_model.out.2", torch.nn.Conv2d(64, 4, 3, padding=1))
        for wanted in (other, models.quantized):
            load(models.quantized if wanted is other else other)
            moves.clear()
            load(wanted)
            assert models.quantized.offload_device in moves


WHERE = {"object patches": "patch_model", "injections": "eject_model"}


def broken(*_: object) -> None:
    raise RuntimeError("broken")


def broken_once() -> Callable:
    """Return a function that fails when it is called first."""
    calls = iter([broken])
    return lambda *_, **__: next(calls, lambda: None)()
