"""The layers by themselves: how they load, and that every way through them gives the same."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_extras.nodes_model_advanced import ModelComputeDtype
from harness.inprocess import distance, held, same, sample
from hswq.loader.engine.operations import hswq_operations
from hswq.quant import quantize

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NAMES = ["linear", "conv"]


def decide(name: str, weight: torch.Tensor, _: torch.device):
    """Keep a layer that is called so, and quantize the others."""
    return weight if "kept" in name else quantize(weight, weight.abs().max(), scaled=True)


class Network(torch.nn.Module):
    """One layer of every kind."""

    def __init__(self, operations, dtype: torch.dtype) -> None:
        super().__init__()
        how = {"device": torch.device("cpu"), "dtype": dtype}
        for suffix in ("", "_kept"):
            setattr(self, f"linear{suffix}", operations.Linear(24, 16, **how))
            setattr(self, f"conv{suffix}", operations.Conv2d(24, 16, 3, padding=1, stride=2, **how))
        self.unbiased = operations.Linear(24, 16, bias=False, **how)


def weights(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    network = Network(comfy.ops.disable_weight_init, dtype)
    return {
        key: (torch.randn(value.shape, generator=generator) * 0.1).to(dtype)
        for key, value in network.state_dict().items()
    }


def made(dtype=torch.float16, *, manual_cast=False, assign=False, **changes) -> Network:
    network = Network(hswq_operations(decide, manual_cast=manual_cast), dtype)
    state = {**weights(), **changes}
    network.load_state_dict({k: v for k, v in state.items() if v is not None}, assign=assign)
    return network


def inputs(name: str, dtype: torch.dtype) -> torch.Tensor:
    shape = (2, 24, 8, 8) if "conv" in name else (2, 7, 24)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(network: Network, name: str, values: torch.Tensor) -> torch.Tensor:
    """Return what torch's own layer computes from the weights in real units."""
    layer = network.get_submodule(name)
    weight, bias = layer.weight.detach(), layer.bias
    if isinstance(weight, QuantizedTensor):
        weight = weight._qdata.float() * weight._params.scale
    weight, bias = weight.to(values.dtype), None if bias is None else bias.to(values.dtype)
    if "conv" in name:
        return torch.nn.functional.conv2d(values, weight, bias, stride=2, padding=1)
    return torch.nn.functional.linear(values, weight, bias)


class TestForward:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ["linear", "conv", "linear_kept", "conv_kept", "unbiased"])
    def test_in_the_models_dtype(self, name, dtype):
        """The way of a GPU that computes in 16 bit, all weights on it."""
        network, values = made(dtype), inputs(name, dtype)
        assert network.get_submodule(name)(values).equal(expected(network, name, values))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ["linear", "conv", "linear_kept", "conv_kept", "unbiased"])
    def test_cast_to_the_inputs_dtype(self, name, dtype):
        network, values = made(manual_cast=True), inputs(name, dtype)
        assert network.get_submodule(name)(values).equal(expected(network, name, values))

    @pytest.mark.parametrize("name", NAMES)
    def test_with_functions_on_weight_and_bias(self, name):
        """What LoRAs on offloaded weights are, and what other nodes add."""
        network, values = made(torch.float32), inputs(name, torch.float32)
        layer, plain = network.get_submodule(name), network.get_submodule(name)(values)
        layer.weight_function = [lambda weight: weight * 2]
        bias = layer.bias.view(-1, 1, 1) if name == "conv" else layer.bias
        assert layer(values).allclose(2 * (plain - bias) + bias, atol=1e-5)
        layer.bias_function = [lambda bias: bias + 3]
        assert layer(values).allclose(2 * (plain - bias) + bias + 3, atol=1e-5)
        layer.weight_function = layer.bias_function = []
        assert layer(values).equal(plain)

    def test_large_weights_do_not_overflow(self):
        """448 times the scale may be far below FP16's maximum, but not 448 by itself times it."""
        network = made(**{"linear.weight": torch.full((16, 24), 6e4, dtype=torch.float16)})
        values = torch.full((1, 24), 1e-3, dtype=torch.float16)
        assert network.linear(values).isfinite().all()
        assert network.linear.convert_weight(network.linear.weight).isfinite().all()

    def test_can_be_interrupted(self):
        network = made()
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            network.linear(inputs("linear", torch.float16))
        network.linear(inputs("linear", torch.float16))


class TestLoading:
    @pytest.mark.parametrize("assign", [True, False])
    def test_quantizes_and_keeps_as_decided(self, assign):
        network, state = made(assign=assign), weights()
        for name, layer in network.named_children():
            quantized = isinstance(layer.weight, QuantizedTensor)
            assert quantized == ("kept" not in name)
            if not quantized:
                assert layer.weight.equal(state[f"{name}.weight"])
            if layer.bias is not None:
                assert layer.bias.equal(state[f"{name}.bias"])

    def test_shares_the_files_memory_only_where_it_assigns(self):
        for assign in (True, False):
            with torch.inference_mode(False):  # as the loader reads files
                kept = torch.ones(16, 24, dtype=torch.float16)
            network = made(assign=assign, **{"linear_kept.weight": kept})
            assert (network.linear_kept.weight.data_ptr() == kept.data_ptr()) == assign

    def test_another_shape_is_an_error_that_names_it(self):
        wrong = r"linear.weight has the shape \(3, 3\), not \(16, 24\)"
        with pytest.raises(RuntimeError, match=wrong):
            made(**{"linear.weight": torch.ones(3, 3)})

    def test_missing_and_unknown_keys_are_reported(self):
        network = Network(hswq_operations(decide, manual_cast=False), torch.float16)
        state = weights()
        del state["conv.bias"]
        state["linear.more"] = torch.ones(1)
        found = network.load_state_dict(state, strict=False)
        assert (found.missing_keys, found.unexpected_keys) == (["conv.bias"], ["linear.more"])
        assert not network.conv.bias.any()

    def test_no_memory_before_the_weights_come(self):
        network = Network(hswq_operations(decide, manual_cast=False), torch.float16)
        assert not list(network.parameters())

    def test_every_load_has_classes_of_its_own(self):
        """So that one model's decisions are never another's."""
        first, second = (hswq_operations(decide, manual_cast=False) for _ in range(2))
        assert first.Linear is not second.Linear
        assert issubclass(first.Linear, torch.nn.Linear)
        assert issubclass(first.Conv2d, torch.nn.Conv2d)
        assert not hasattr(comfy.ops.disable_weight_init.Linear, "_decide")


class TestPatching:
    @pytest.mark.parametrize("name", ["linear", "conv", "linear_kept", "conv_kept"])
    def test_set_weight_takes_what_convert_weight_gives(self, name):
        layer = made().get_submodule(name)
        before = layer.weight
        real = layer.convert_weight(before.to(torch.float32))
        assert real.dtype == torch.float32
        assert type(real) in (torch.Tensor, torch.nn.Parameter)
        for how in ({}, {"inplace_update": True}, {"return_weight": True}):
            after = layer.set_weight(real, seed=5, **how)
            after = layer.weight if after is None else after
            assert after.dtype == before.dtype
            assert distance(layer.convert_weight(after), layer.convert_weight(before)) == 0

    def test_is_reproducible_by_its_seed(self):
        layer = made().linear
        real = layer.convert_weight(layer.weight.to(torch.float32)) * 1.01
        same_seed = [layer.set_weight(real, seed=5, return_weight=True)._qdata for _ in range(2)]
        other = layer.set_weight(real, seed=6, return_weight=True)._qdata
        as_bytes = [data.view(torch.uint8) for data in (*same_seed, other)]
        assert as_bytes[0].equal(as_bytes[1])
        assert not as_bytes[0].equal(as_bytes[2])


class TestComputeDtype:
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_is_another_where_a_node_says_so(self, models, dtype):
        before, latent = held(models.quantized), sample(models.quantized)
        other = ModelComputeDtype().patch(models.quantized, dtype)[0]
        assert distance(sample(other), latent) < 0.1
        assert sample(models.quantized).equal(latent)
        assert not same(held(models.quantized), before)
