"""What the original's Dual Monitor measured, layer by layer."""

import pytest
import torch
from helpers import golden, golden_tensor
from hswq.calibration import DualMonitor

MONITORED = golden("monitors")


class Replay(torch.nn.Linear):
    """A layer that gives the outputs that the original's layer gave."""

    def __init__(self, outputs: list[torch.Tensor]) -> None:
        super().__init__(1, 1)
        self.outputs = iter(outputs)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return next(self.outputs)


@pytest.mark.parametrize("layer", MONITORED, ids=[layer["name"] for layer in MONITORED])
class TestGolden:
    @pytest.fixture
    def measured(self, layer, device):
        name, calls = layer["name"], range(layer["calls"])
        outputs = [golden_tensor(f"monitor.{name}.{call}.output").to(device) for call in calls]
        model = torch.nn.Sequential(Replay(outputs))
        with DualMonitor(model) as monitor:
            for call in calls:
                model(golden_tensor(f"monitor.{name}.{call}.input").to(device))
        return monitor.statistics()["0"]

    def test_sensitivity(self, layer, measured):
        assert measured.calls == layer["calls"]
        assert measured.sensitivity == pytest.approx(layer["sensitivity"], rel=1e-6)

    def test_importance(self, layer, measured):
        expected = golden_tensor(f"monitor.{layer['name']}.importance").double()
        # The original keeps a running mean in FP32, with an error of its own.
        torch.testing.assert_close(measured.importance, expected, rtol=1e-6, atol=0)
