"""The HSWQ algorithm in plain torch: clipping search, rounding (nearest or compensated), Plan.

Knows nothing of ComfyUI, of files or of the web. Statistics arrive as plain mappings.
"""

from .by_effect import LARGEST_EFFECT, ByEffect
from .compensate import output_error, quantize_compensated
from .decider import Decider, KnownPlan, decider_of, stored
from .dequantizing import dequantize
from .findings import Findings, LayerFinding
from .formats import (
    FP8_PLAIN,
    FP8_SCALED,
    INT8,
    NUMBER_FORMATS,
    Clipping,
    NumberFormat,
    fp8_format,
)
from .formats.number_format import bytes_of
from .fp8 import FP8_MAX, quantize
from .histogram import WeightedHistogram, weighted_histogram
from .int8 import INT8_MAX
from .plan import LayerPlan, Plan, expected_error
from .planner import Planner, make_plan
from .reasons import Reason
from .search import DEFAULT_SETTINGS, SearchSettings, optimal_amax, search_amax, weighted_mse
from .selection import BySensitivity, Selection, is_finite
from .settings import QuantizeSettings

__all__ = [
    "DEFAULT_SETTINGS",
    "FP8_MAX",
    "FP8_PLAIN",
    "FP8_SCALED",
    "INT8",
    "INT8_MAX",
    "LARGEST_EFFECT",
    "NUMBER_FORMATS",
    "ByEffect",
    "BySensitivity",
    "Clipping",
    "Decider",
    "Findings",
    "KnownPlan",
    "LayerFinding",
    "LayerPlan",
    "NumberFormat",
    "Plan",
    "Planner",
    "QuantizeSettings",
    "Reason",
    "SearchSettings",
    "Selection",
    "WeightedHistogram",
    "bytes_of",
    "decider_of",
    "dequantize",
    "expected_error",
    "fp8_format",
    "is_finite",
    "make_plan",
    "optimal_amax",
    "output_error",
    "quantize",
    "quantize_compensated",
    "search_amax",
    "stored",
    "weighted_histogram",
    "weighted_mse",
]
