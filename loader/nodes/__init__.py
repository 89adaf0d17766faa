"""The nodes: thin adapters between ComfyUI's graph and the rooms that do the work.

May import host, files, store, engine, recording, jobs, calibration and quant.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..host.selfcheck import COMPARING, MEASURING, QUANTIZING, RECORDING, Part


def nodes_of(parts: list[Part]) -> list[type[io.ComfyNode]]:
    """Return the nodes of some parts. Modules of other parts are not imported: they may fail."""
    from .merge import HSWQMergeStatistics

    nodes = [HSWQMergeStatistics]
    if QUANTIZING in parts:
        from .converter import HSWQConverter
        from .export import HSWQExport
        from .loaders import HSWQCheckpointLoader, HSWQDiffusionModelLoader
        from .plan import HSWQPlan

        nodes += [HSWQCheckpointLoader, HSWQDiffusionModelLoader, HSWQConverter, HSWQExport]
        nodes.append(HSWQPlan)
    if RECORDING in parts:
        from .calibration import HSWQCalibration

        nodes.append(HSWQCalibration)
    if all(part in parts for part in (QUANTIZING, RECORDING, MEASURING)):
        from .effect import HSWQMeasureEffect
        from .verify import HSWQVerify

        nodes += [HSWQMeasureEffect, HSWQVerify]
    if COMPARING in parts:
        from .compare import HSWQCompare

        nodes.append(HSWQCompare)
    return nodes
