"""The HSWQ algorithm in plain torch: clipping search, FP8 rounding (nearest or compensated), Plan.

Knows nothing of ComfyUI, of files or of the web. Statistics arrive as plain mappings.
"""

from .compensate import can_compensate, output_error, quantize_compensated
from .findings import Findings, LayerFinding
from .fp8 import FP8_MAX, dequantize, quantize
from .histogram import WeightedHistogram, weighted_histogram
from .plan import LayerPlan, Plan, expected_error
from .planner import Planner, make_plan
from .search import DEFAULT_SETTINGS, SearchSettings, optimal_amax, search_amax, weighted_mse
from .settings import QuantizeSettings

__all__ = [
    "DEFAULT_SETTINGS",
    "FP8_MAX",
    "Findings",
    "LayerFinding",
    "LayerPlan",
    "Plan",
    "Planner",
    "QuantizeSettings",
    "SearchSettings",
    "WeightedHistogram",
    "can_compensate",
    "dequantize",
    "expected_error",
    "make_plan",
    "optimal_amax",
    "output_error",
    "quantize",
    "quantize_compensated",
    "search_amax",
    "weighted_histogram",
    "weighted_mse",
]
