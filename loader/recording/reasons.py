"""Why a model's samplings are not recorded; the panel explains each in locales/*/main.json."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ..engine.identity import Identity, identity
from ..engine.network import is_changed, is_compiled, own_layers, own_network
from ..engine.patchers import is_quantized, takes_another_model, unknown_layers
from .status import QUANTIZED

COMPILED = "it is compiled"
TRAINED = "it is being trained"
CHANGED = "its network is changed by a node"
ANOTHER_MODEL = "its conditioning brings in another model"
NOT_ITS_FILES = "its weights are not those of its file"
UNDECIDED = "its weights are still being compared with those of another file"
UNFINISHED = "the last sampling did not finish"
NO_FILE = "it is a merge or was not loaded from a file"


def unrecordable(patcher: ModelPatcher) -> str | None:
    """Return why a sampling would not measure a model's own 16-bit weights; None if it would."""
    if is_quantized(patcher):
        return QUANTIZED
    if is_compiled(patcher):
        return COMPILED
    if own_network(patcher).training:
        return TRAINED
    if is_changed(patcher):
        return CHANGED
    if takes_another_model(patcher):
        return ANOTHER_MODEL
    return unknown_layers(patcher) or _of_identity(patcher, identity(patcher))


def _of_identity(patcher: ModelPatcher, found: Identity | None) -> str | None:
    if found is None:
        return NOT_ITS_FILES
    if not found.is_decided:
        return UNDECIDED
    return None if own_layers(patcher).keys() == set(found.layers) else CHANGED
