"""Explaining black pictures: another loader has loaded a file that only HSWQ can read."""

from __future__ import annotations

import logging

import torch
from comfy.model_patcher import ModelPatcher

from ..engine.alive import ATTACHMENT
from ..engine.identity import identity
from ..files.layer_formats import only_ours
from ..files.model_file import ModelFile
from ..files.safetensors import is_safetensors
from .status import FAILED, ModelStatus, StatusTable

_REASONS = {  # the panel has a text for each
    "original V2": "its file is in the format original V2, which only HSWQ reads",
    "scaled, convs too": "its file is in the format scaled, convs too, which only HSWQ reads",
    "int8, convs too": "its file is in the format int8, convs too, which only HSWQ reads",
}


def explain(table: StatusTable, patcher: ModelPatcher, latent: torch.Tensor) -> None:
    """Note why a MODEL's pictures are black, if the format of its file is the reason.

    Other loaders load such a file without an error, so that only the result shows it. Never raises.

    Args:
        table: takes the note, which goes to the log and the panel.
        patcher: MODEL that has sampled.
        latent: result of the sampling.
    """
    try:
        if patcher.get_attachment(ATTACHMENT) is not None or latent.isfinite().all():
            return
        its = identity(patcher)
        if its is None or its.path is None or not is_safetensors(its.path):
            return  # the formats are of safetensors; another file would be read whole
        reason = _REASONS.get(only_ours(ModelFile(its.path).own))
    except Exception as error:  # no error here may prevent the picture
        logging.info("HSWQ: a result that is not finite could not be explained: %s", error)
        return
    if reason is not None:
        table.note(ModelStatus(its.name, its.fingerprint, FAILED, 0, reason))
