"""The Dual Monitor: statistics of a model's layers, and the file that keeps them.

Pure torch; knows nothing of ComfyUI.
"""

from .atomic import atomic_file, sweep
from .files import StatisticsError, load_statistics, save_statistics
from .monitor import DualMonitor, monitored_layers
from .rotation import Rotation
from .sketch import Sketch, merge_sketches
from .statistics import LayerStatistics, Statistics

__all__ = [
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
    "save_statistics",
    "sweep",
]
