"""Which layers stream where the GPU cannot hold all: few, large, and evenly over the step."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import comfy.lora
import comfy.model_management
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness.inprocess import (
    assert_frees_what_is_asked,
    load,
    load_partly,
    patched,
    predicted,
    unload,
)
from harness.patches import patch_file
from hswq.loader.engine.streaming import LARGEST_STREAMED, LoadOrder, stream_large_layers


def sizes(patcher: ModelPatcher) -> tuple[list[int], list[int]]:
    """Return the bytes of the modules that stream, and of those that stay on the device."""
    streaming, staying = [], []
    for module in patcher.model.modules():
        if hasattr(module, "comfy_cast_weights"):
            place = streaming if hasattr(module, "prev_comfy_cast_weights") else staying
            place.append(comfy.model_management.module_size(module))
    return streaming, staying


def place(patcher: ModelPatcher, key: str) -> int:
    """Return where in memory a weight is."""
    weight = comfy.utils.get_attr(patcher.model, key)
    return getattr(weight, "_qdata", weight).data_ptr()


def in_comfyuis_order(patcher: ModelPatcher) -> ModelPatcher:
    """Return a patcher of the same model that is loaded as stock would."""
    return ModelPatcher(
        patcher.model, patcher.load_device, patcher.offload_device, patcher.model_size()
    )


class TestPartlyLoaded:
    def test_large_layers_stream_and_small_ones_stay(self, models, legacy):
        streaming, staying = sizes(load_partly(models.quantized, 0.6))
        assert min(streaming) >= max(staying)

    def test_fewer_stream_than_in_comfyuis_order(self, models, legacy):
        ours = sizes(load_partly(models.quantized, 0.6))[0]
        unload()
        theirs = in_comfyuis_order(models.quantized)
        stock = sizes(load_partly(theirs, 0.6))[0]
        unload()  # while there is a patcher that can
        assert len(ours) < len(stock) / 3
        assert sum(ours) < 1.3 * sum(stock)

    def test_what_has_to_go_is_few_large_ones(self, models, legacy):
        patcher = load_partly(models.quantized, 2)
        patcher.partially_unload(patcher.offload_device, 0.3 * patcher.model_size())
        streaming, staying = sizes(patcher)
        assert min(streaming) >= max(staying)

    def test_no_more_leaves_than_a_vae_asks_for(self, models, legacy):
        assert_frees_what_is_asked(models.quantized.clone())

    @pytest.mark.parametrize("how", [{}, {"disable_dynamic": True}, {"force_deepcopy": True}])
    def test_clones_do_the_same(self, models, memory, how):
        stream_large_layers(models.quantized)  # again: it changes nothing
        clone = models.quantized.clone(**how)
        assert isinstance(clone._load_list(), LoadOrder)
        assert isinstance(clone.clone()._load_list(), LoadOrder)
        assert isinstance(clone, ModelPatcher)

    def test_what_is_replaced_is_not_held_until_the_end(self, models, legacy):
        layer = load(models.quantized).model.diffusion_model.out[2]
        entries, weight = models.quantized._load_list(), weakref.ref(layer.weight)
        layer.to("cpu")
        assert entries
        assert weight() is None

    def test_stock_models_are_left_alone(self, models, memory):
        assert type(models.sixteen_bit._load_list()) is list


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

    def test_are_applied_in_place(self, models, moves):
        """New weights would lie between the memory that patching takes, and gaps remain."""
        strong, weak = (patched(models.quantized, patch_file("LoRA"), s) for s in (1.0, 0.5))
        load(models.quantized)
        before = {key: place(models.quantized, key) for key in strong.patches}
        for wanted in (strong, weak, models.quantized):
            load(wanted)
            assert {key: place(models.quantized, key) for key in strong.patches} == before

    def test_find_weights_on_the_gpu(self, models, legacy, monkeypatch):
        """They are there before patching takes memory, though the model comes from the host."""
        model, found, calculate = models.quantized, {}, comfy.lora.calculate_weight
        if model.load_device.type == "cpu":
            pytest.skip("needs an NVIDIA GPU")

        def noted(patches: list, weight: torch.Tensor, key: str, *args, **kwargs) -> torch.Tensor:
            found[key] = place(model, key)
            return calculate(patches, weight, key, *args, **kwargs)

        unload()
        monkeypatch.setattr(comfy.lora, "calculate_weight", noted)
        with_lora = patched(model, patch_file("LoRA"))
        on_host = {key: place(model, key) for key in with_lora.patches}
        load(with_lora)
        assert found.keys() == on_host.keys()
        for key, before in on_host.items():
            assert place(model, key) == found[key] != before

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


def entries(*sizes: int) -> list[tuple]:
    """Return modules of these sizes as a patcher lists them, in the network's order."""
    return [(size, size, f"layer {at}", None, {}) for at, size in enumerate(sizes)]


def kept(*sizes: int, count: int) -> list[int]:
    """Return which of some modules are the first that ComfyUI keeps."""
    order = LoadOrder(entries(*sizes), first_is_kept=False)
    order.sort(reverse=True)
    return sorted(int(entry[2].split()[1]) for entry in order[:count])


class TestOrder:
    def test_of_equal_ones_every_second_stays(self):
        assert kept(*[5] * 8, count=4) in ([0, 2, 4, 6], [1, 3, 5, 7])

    def test_what_is_too_large_to_stream_stays(self):
        assert kept(1, LARGEST_STREAMED + 1, LARGEST_STREAMED, count=2) == [0, 1]

    def test_dynamic_vram_has_the_kept_ones_in_front(self):
        front, back = (
            LoadOrder(entries(3, 1, 2, 2, 1), first_is_kept=first) for first in (True, False)
        )
        front.sort()
        back.sort(reverse=True)
        assert front == back
        assert [size for size, *_ in front] == [1, 1, 2, 2, 3]
