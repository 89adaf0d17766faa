"""Number formats: how a quantized weight is searched and rounded, and how many bytes it takes.

A format is a frozen value. `loader/engine/layout.py` holds its weights in memory, and
`loader/files/layer_formats.py` knows its keys in files. A new format is an entry in each of them.
"""

from .fp8 import FP8_PLAIN, FP8_SCALED, fp8_format
from .int8 import INT8
from .number_format import Clipping, NumberFormat

NUMBER_FORMATS: dict[str, NumberFormat] = {one.name: one for one in (FP8_SCALED, FP8_PLAIN, INT8)}
"""Every format by the name that nodes, files and the panel use; the first is the default."""

__all__ = [
    "FP8_PLAIN",
    "FP8_SCALED",
    "INT8",
    "NUMBER_FORMATS",
    "Clipping",
    "NumberFormat",
    "fp8_format",
]
