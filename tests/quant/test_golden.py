"""What the original project's own code computed, case by case."""

import pytest
import torch
from helpers import golden, golden_tensor
from hswq.quant import optimal_amax, quantize, weighted_mse

CASES = golden("cases")


@pytest.fixture(params=CASES, ids=[f"{case['weight']}-{case['key']}" for case in CASES])
def case(request) -> dict:
    return request.param


@pytest.fixture
def weight(case, device) -> torch.Tensor:
    return golden_tensor(f"{case['case']}.weight").to(device)


@pytest.fixture
def importance(case) -> torch.Tensor | None:
    return golden_tensor(f"{case['case']}.importance")


def amax_of(case, weight, importance) -> float:
    settings = {name: case[name] for name in ("scaled", "bins", "candidates", "refinements")}
    return optimal_amax(weight, importance, **settings)


def stored_mse(stored, scale, weight, importance) -> float:
    """The weighted mean squared error of the bytes themselves, weight by weight in float64."""
    values = stored.view(torch.float8_e4m3fn).to(torch.float64) * scale.item()
    error = (values - weight.to(torch.float64)).square()
    channels = torch.ones(weight.shape[1], dtype=torch.float64)
    if importance is not None and importance.any():
        known = min(len(channels), len(importance))
        channels[:known] = importance[:known].to(torch.float64)
    per_weight = channels.view(1, -1, *[1] * (weight.ndim - 2)).expand_as(error)
    return ((error * per_weight).sum() / per_weight.sum()).item()


class TestGolden:
    def test_amax(self, case, weight, importance):
        amax = amax_of(case, weight, importance)
        assert amax == pytest.approx(case["optimal_amax"], rel=1e-6)

    def test_estimated_mse(self, case, weight, importance):
        error = weighted_mse(
            weight, importance, case["optimal_amax"], scaled=case["scaled"], bins=case["bins"]
        )
        # Far below the 1e-5 that is asked for: on this the choice between candidates rests.
        assert error == pytest.approx(case["estimated_mse"], rel=1e-12)

    def test_bytes(self, case, weight, importance):
        amax = amax_of(case, weight, importance)
        stored, scale = (part.cpu() for part in quantize(weight, amax, scaled=case["scaled"]))
        stored, original = stored.view(torch.uint8), golden_tensor(f"{case['key']}.fp8")
        same = (stored == original).to(torch.float64).mean()
        assert same == 1 if not case["scaled"] else same >= 0.99
        ours = stored_mse(stored, scale, weight.cpu(), importance)
        assert ours <= stored_mse(original, scale, weight.cpu(), importance)
