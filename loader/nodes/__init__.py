"""The nodes: adapters between ComfyUI's graph and the rooms that do the work."""

from .calibration import HSWQCalibration
from .compare import HSWQCompare
from .converter import HSWQConverter
from .export import HSWQExport
from .loaders import HSWQCheckpointLoader, HSWQDiffusionModelLoader
from .merge import HSWQMergeStatistics
from .plan import HSWQPlan

NODES = [
    HSWQCheckpointLoader,
    HSWQDiffusionModelLoader,
    HSWQCalibration,
    HSWQConverter,
    HSWQExport,
    HSWQMergeStatistics,
    HSWQPlan,
    HSWQCompare,
]
