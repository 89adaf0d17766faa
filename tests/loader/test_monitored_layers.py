"""The Dual Monitor on the layers that ComfyUI has: its own quantized Linear too."""

from __future__ import annotations

import comfy.ops
import pytest
import reference
import torch
from comfy.quant_ops import QuantizedTensor
from harness.inprocess import load, noise, sample
from hswq.calibration import DualMonitor, monitored_layers


class Network(torch.nn.Module):
    """ComfyUI's quantized Linear, beside what is no layer."""

    def __init__(self) -> None:
        super().__init__()
        operations = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32)
        self.quantized = operations.Linear(24, 16, device="cpu")
        self.norm = operations.LayerNorm(16)
        self.embedding = operations.Embedding(4, 24)

    def forward(self, values):
        return self.norm(self.quantized(values))


@pytest.fixture
def network() -> Network:
    generator = torch.Generator().manual_seed(0)
    network = Network()
    weight = torch.randn(16, 24, generator=generator)
    held = QuantizedTensor.from_float(weight, "TensorCoreFP8E4M3Layout", scale="recalculate")
    marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    state = {
        "quantized.weight": held._qdata, "quantized.weight_scale": held._params.scale,
        "quantized.comfy_quant": marker, "quantized.bias": torch.zeros(16),
        "norm.weight": torch.ones(16), "norm.bias": torch.zeros(16),
        "embedding.weight": torch.zeros(4, 24),
    }  # fmt: skip
    network.load_state_dict(state)
    return network


class TestComfyUIsQuantizedLinear:
    def test_is_a_layer(self, network):
        assert not isinstance(network.quantized, (torch.nn.Linear, torch.nn.Conv2d))
        assert isinstance(network.quantized.weight, QuantizedTensor)
        assert list(monitored_layers(network)) == ["quantized"]

    def test_is_measured(self, network):
        calls = [torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
        with DualMonitor(network) as monitor:
            outputs = [network.quantized(values) for values in calls]
        found = monitor.statistics()["quantized"]
        assert found.calls == 2
        assert found.sensitivity == pytest.approx(reference.sensitivity(outputs), rel=1e-5)
        assert found.importance.tolist() == pytest.approx(reference.importance(calls), rel=1e-6)

    def test_has_no_hook_left(self, network):
        with DualMonitor(network), pytest.raises(ZeroDivisionError):
            raise ZeroDivisionError
        assert not network.quantized._forward_hooks


class TestOurs:
    def test_quantized_layers_are_measured_by_their_own_names(self, models):
        network = load(models.quantized).model.diffusion_model
        names = list(monitored_layers(network))
        assert names == list(monitored_layers(models.sixteen_bit.model.diffusion_model))
        with DualMonitor(network) as monitor:
            sample(models.quantized)
        assert monitor.statistics().keys() == set(names)
        assert noise().shape[0] == 1
