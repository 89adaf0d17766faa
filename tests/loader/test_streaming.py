"""Which layers stream where the GPU cannot hold all: few, large, and evenly over the step."""

from __future__ import annotations

import time
import weakref

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness.inprocess import assert_frees_what_is_asked, load, load_partly, unload
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.streaming import LARGEST_STREAMED, LoadOrder, stream_large_layers


def sizes(patcher: ModelPatcher) -> tuple[list[int], list[int]]:
    """Return the bytes of the modules that stream, and of those that stay on the device."""
    streaming, staying = [], []
    for module in patcher.model.modules():
        if hasattr(module, "comfy_cast_weights"):
            place = streaming if hasattr(module, "prev_comfy_cast_weights") else staying
            place.append(comfy.model_management.module_size(module))
    return streaming, staying


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


def linears(patcher: ModelPatcher) -> list[torch.nn.Module]:
    """Return a MODEL's quantized Linear layers that have a bias."""
    network = patcher.model.diffusion_model
    layers = map(network.get_submodule, patcher.get_attachment(ATTACHMENT).quantized)
    return [one for one in layers if one.weight.ndim == 2 and one.bias is not None]


def inputs_of(layer: torch.nn.Module, device: torch.device | str) -> torch.Tensor:
    return torch.ones(3, layer.weight.shape[1], dtype=layer.weight.dtype, device=device)


class TestLayer:
    @pytest.fixture
    def layer(self, models):
        """On the host, as what is streamed."""
        unload()
        return linears(models.quantized)[0]

    def test_that_is_only_streamed_takes_the_short_way(self, layer):
        inputs = inputs_of(layer, "meta")
        assert layer._is_only_streamed(inputs)
        assert not layer._is_only_streamed(inputs.to(torch.float64))
        assert not layer._is_only_streamed(inputs_of(layer, layer.weight.device))

    @pytest.mark.parametrize("function", ["weight_function", "bias_function"])
    def test_with_a_patch_takes_comfyuis_way(self, layer, monkeypatch, function):
        monkeypatch.setattr(layer, function, [lambda weight: weight])
        assert not layer._is_only_streamed(inputs_of(layer, "meta"))

    @pytest.mark.gpu
    @pytest.mark.parametrize("late", ["copies", "product"])
    def test_computes_after_its_copies_and_copies_after_its_product(self, models, legacy, late):
        """The next layer's copies may get the same memory."""
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        unload()
        layers = linears(load_partly(models.quantized, 0.01))
        layer = next(one for one in layers if one.weight.is_pinned())
        inputs = inputs_of(layer, models.quantized.load_device)
        expected, sides = layer(inputs), comfy.model_management.STREAMS[inputs.device]
        torch.cuda.synchronize()
        products = [torch.cuda.current_stream()]
        for stream in sides if late == "copies" else products:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000_000)
        found = layer(inputs)
        time.sleep(0.05)
        assert not any(stream.query() for stream in (products if late == "copies" else sides))
        assert found.equal(expected)


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
