"""The Dual Monitor: statistics of a model's layers, and the file that keeps them.

Pure torch; knows nothing of ComfyUI.
"""

from .files import StatisticsError, atomic_file, load_statistics, save_statistics
from .monitor import DualMonitor, monitored_layers
from .noise_levels import LEVELS, NOISE_LEVELS, noise_levels, seen_levels
from .rotation import Rotation
from .statistics import LayerStatistics, Statistics

__all__ = [
    "LEVELS",
    "NOISE_LEVELS",
    "DualMonitor",
    "LayerStatistics",
    "Rotation",
    "Statistics",
    "StatisticsError",
    "atomic_file",
    "load_statistics",
    "monitored_layers",
    "noise_levels",
    "save_statistics",
    "seen_levels",
]
