"""The Dual Monitor: it measures statistics of a model's layers, and saves them in a file.

Plain torch: nothing here imports ComfyUI, or `quant`.
"""

from .atomic import atomic_file, sweep
from .files import StatisticsError, load_statistics, save_statistics
from .monitor import DualMonitor, monitored_layers
from .noise_levels import LEVELS, NOISE_LEVELS, noise_levels, seen_levels
from .rotation import Rotation
from .sketch import Sketch, merge_sketches
from .statistics import LayerStatistics, Statistics

__all__ = [
    "LEVELS",
    "NOISE_LEVELS",
    "DualMonitor",
    "LayerStatistics",
    "Rotation",
    "Sketch",
    "Statistics",
    "StatisticsError",
    "atomic_file",
    "load_statistics",
    "merge_sketches",
    "monitored_layers",
    "noise_levels",
    "save_statistics",
    "seen_levels",
    "sweep",
]
