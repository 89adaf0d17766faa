"""The noise levels of a sampling, from the schedule that its sampler is given."""

from __future__ import annotations

import logging

from comfy.model_patcher import ModelPatcher

from ...calibration import NOISE_LEVELS, noise_levels


def levels_of(patcher: ModelPatcher, arguments: tuple, named: dict) -> dict[str, str]:
    """Return what the statistics' meta shall say of a sampling's noise; nothing where unknown.

    A sampler's forwards between two steps are not counted.

    Args:
        patcher: that is sampled with.
        arguments, named: what CFGGuider.outer_sample is given after the noise.
    """
    try:
        sigmas = named["sigmas"] if "sigmas" in named else arguments[2]
        schedule = patcher.get_model_object("model_sampling")
        return {NOISE_LEVELS: noise_levels(sigmas[:-1].tolist(), schedule.percent_to_sigma)}
    except Exception as error:  # other nodes bring schedules of their own: the picture goes first
        logging.info("HSWQ: the noise levels of this sampling are not known: %s", error)
        return {}
