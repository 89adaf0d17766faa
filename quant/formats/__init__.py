"""Number formats: how a quantized weight is rounded, searched, and what it weighs.

A format is a frozen value. What holds it in memory is `loader/engine/layout.py`, what names its
keys in files is `loader/files/layer_formats.py`; a new format is an entry here and there.
"""

from .fp8 import FP8_PLAIN, FP8_SCALED, fp8_format
from .number_format import NumberFormat

NUMBER_FORMATS: dict[str, NumberFormat] = {one.name: one for one in (FP8_SCALED, FP8_PLAIN)}
"""Every format by the name that nodes, files and the panel use; the first is the default."""

__all__ = ["FP8_PLAIN", "FP8_SCALED", "NUMBER_FORMATS", "NumberFormat", "fp8_format"]
