"""Searching all layers of a model at once, so that a Plan for any keep_ratio is known."""

from __future__ import annotations

import logging
import os

import comfy.model_management as memory
import comfy.utils

from ...quant import Plan, Planner, QuantizeSettings
from ..engine.model_structure import find_layers
from ..engine.quantizer import WORK_BYTES, quantizing_device, restrict
from ..engine.transfer import Transfer
from ..files.fingerprints import fingerprint
from ..files.model_file import check_16_bit, load_tensors
from .choice import FAIL, choose


def search_all(path: str, statistics: str, *, scaled: bool) -> str:
    """Search every measured layer of a model file that was not searched yet, and keep the result.

    Memory for one layer is enough. An error or an interrupt leaves what was known.

    Args:
        path: of a checkpoint or a diffusion model, in 16 bit.
        statistics: "auto" or a file of the statistics folder.
        scaled: V2 (True) or V1.

    Returns:
        A line about it, for people.

    Raises:
        ModelFileError: the file is damaged, unknown, or quantized already.
        StatisticsError, ValueError: as of choice.choose; the statistics are another model's.
    """
    name = os.path.basename(path)
    check_16_bit(path)
    settings = QuantizeSettings(scaled, keep_ratio=0.0)  # nothing is kept for its sensitivity
    chosen = choose(statistics, fingerprint(path), name, settings, FAIL)
    if isinstance(chosen.source, Plan):
        return f"all layers of {name} were searched before; {chosen.about}"
    plan, searched = search(path, chosen.source)
    chosen.keep(plan)
    text = f"{searched} layers searched of {len(plan.quantized)} that can be FP8; {chosen.about}"
    logging.info("HSWQ: %s: %s", name, text)
    return text


def search(path: str, planner: Planner) -> tuple[Plan, int]:
    """Return the Plan, and how many layers were searched for it."""
    layers = find_layers(os.path.basename(path), *load_tensors(path))
    restrict(planner, layers, os.path.basename(path))
    transfer = Transfer(quantizing_device())
    memory.free_memory(WORK_BYTES, transfer.device)
    progress = comfy.utils.ProgressBar(len(layers))
    searched = 0
    for name, weight in layers.items():
        memory.throw_exception_if_processing_interrupted()
        wanted = planner.searches(name)
        planner.add(name, transfer.up(weight) if wanted else weight)
        searched += wanted
        progress.update(1)
    transfer.finish()
    return planner.finish(), searched
