"""Which weights a model in memory holds: found out once, when the model is first seen."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
import weakref
from collections.abc import Iterable, Mapping

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase

from ..files import owners
from ..files.errors import ModelFileError
from ..files.fingerprints import fingerprint
from ..files.model_file import SAMPLE_BYTES, ModelFile
from ..files.versions import version_of
from .model_structure import find_layers
from .network import PREFIX, own_layers

_COMPARED_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which model one in memory is. It stays the same when the file is changed or removed.

    Attributes:
        name: of its file, or of its class if there is no file.
        fingerprint: of its weights.
        layers: names of its own Linear and Conv2d layers, in the model's order.
        path: of its file when the model was first seen; None if there is no file.
        version: of that file (see files.versions).
        merged: whether other weights are merged into the file's; then the fingerprint covers both.
    """

    name: str
    fingerprint: str
    layers: tuple[str, ...]
    path: str | None = None
    version: tuple | None = None
    merged: bool = False

    @property
    def is_of_file(self) -> bool:
        """Whether its weights are exactly those of a file."""
        return self.path is not None and not self.merged

    @property
    def is_decided(self) -> bool:
        """Whether it is known that its fingerprint is not that of another file's weights."""
        return not self.is_of_file or owners.is_decided(self.fingerprint, self.path, self.version)

    @property
    def whole(self) -> dict[str, str]:
        """Entry for the meta of its statistics: the hash over all its weights; {} if unknown."""
        known = owners.whole_of(self.path, self.version) if self.is_of_file else None
        return {} if known is None else {owners.WHOLE: known}


_known: weakref.WeakKeyDictionary[BaseModel, Identity | None] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def remember(model: BaseModel, file: ModelFile, layers: Iterable[str]) -> Identity | None:
    """Note which file a model was just loaded from; return its identity.

    It is None if the file was overwritten in the meantime.

    Args:
        model: just loaded.
        file: the file that it was loaded from.
        layers: names of its Linear and Conv2d layers, in its order.
    """
    found = fingerprint(file)
    its = Identity(file.name, found, tuple(layers), file.path, file.version)
    its = its if _is_still(file) else None
    with _lock:
        _known[model] = its
    return its


def identity(patcher: ModelPatcher) -> Identity | None:
    """Return which model a MODEL is; None if its weights are no longer those of its file.

    A merge counts as a different model than the one it began with. LoRAs change nothing.

    Raises:
        OSError: the file cannot be read.
    """
    model = patcher.model
    with _lock:
        if model not in _known:
            _known[model] = _first_seen(patcher)
        found = _known[model] = _told_apart(_known[model])
    merged = _merged_patches(patcher)
    if found is None or not merged:
        return found
    digest = hashlib.sha256(found.fingerprint.encode())
    _add(digest, [(key, merged[key]) for key in sorted(merged)])
    return dataclasses.replace(
        found, name=f"merge of {found.name}", fingerprint=digest.hexdigest(), merged=True
    )


def _first_seen(patcher: ModelPatcher) -> Identity | None:
    weights = _unpatched_weights(patcher)
    init = patcher.cached_patcher_init
    path = init[1][0] if init and init[1] else None
    if not isinstance(path, str) or not os.path.isfile(path):
        return Identity(type(patcher.model).__name__, _fingerprint_of(weights), tuple(weights))
    file = ModelFile(path)
    try:
        found, layers = fingerprint(file), weights
        if not any(map(is_narrow, weights.values())):
            layers = find_layers(file)
            if not _are_copies(weights, layers):
                return None
    except ModelFileError:  # the file was replaced by something that is not a model
        return None
    return (
        Identity(file.name, found, tuple(layers), path, file.version) if _is_still(file) else None
    )


def _told_apart(found: Identity | None) -> Identity | None:
    """Return an identity with its file's own fingerprint, as far as it is known by now."""
    if found is None or found.path is None:
        return found
    its = owners.resolved(found.fingerprint, found.path, found.version)
    return found if its == found.fingerprint else dataclasses.replace(found, fingerprint=its)


def _is_still(file: ModelFile) -> bool:
    return version_of(file.path) == file.version


def _unpatched_weights(patcher: ModelPatcher) -> dict[str, torch.Tensor]:
    """Return the weights of own_layers as they are held, without LoRAs and hooks."""
    weights = {}
    for name, layer in own_layers(patcher).items():
        key = f"{PREFIX}.{name}.weight"
        weight = layer.weight if key not in patcher.backup else patcher.backup[key].weight
        weight = patcher.hook_backup[key][0] if key in patcher.hook_backup else weight
        if not isinstance(weight, torch.Tensor) or weight.is_meta:
            continue
        # `.data`, since detach() fails for a parameter made in inference mode and moved outside it.
        weights[name] = weight if isinstance(weight, QuantizedTensor) else weight.data
    return weights


def is_narrow(weight: torch.Tensor) -> bool:
    """Whether a weight is held in fewer than 16 bits a value."""
    return isinstance(weight, QuantizedTensor) or weight.dtype.itemsize < 2


def _are_copies(weights: Mapping[str, torch.Tensor], its: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights in memory equal a file's, judged by samples of some layers."""
    names = [name for name in its if name in weights]
    # Spread over the whole model, because a merge may change only some of its blocks.
    compared = names[:: max(1, len(names) // _COMPARED_LAYERS)]
    return all(_is_copy(weights[name], its[name]) for name in compared)


def _is_copy(weight: torch.Tensor, original: torch.Tensor) -> bool:
    if weight.shape != original.shape:
        return False
    return _sample(weight).equal(_sample(original, weight.dtype))


def _sample(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the bytes of some values from the middle of a tensor, converted to a dtype."""
    # The weights of another extension may be of a class whose views do not work.
    values = tensor.as_subclass(torch.Tensor).reshape(-1)
    count = min(values.numel(), SAMPLE_BYTES // (dtype or values.dtype).itemsize)
    start = (values.numel() - count) // 2
    return values[start : start + count].to("cpu", dtype or values.dtype).view(torch.uint8)


def _fingerprint_of(weights: Mapping[str, torch.Tensor]) -> str:
    """Return a fingerprint of weights that do not come from a file."""
    digest = hashlib.sha256()
    _add(digest, list(weights.items()))
    return digest.hexdigest()


def _merged_patches(patcher: ModelPatcher) -> dict[str, list]:
    """Return the patches that are merges: whole weights, or such as scale the model's own.

    The other patches are LoRAs and the like, which leave the model the same.
    """
    # In ComfyUI's patches, [1] is a list for a whole weight, and [2] scales the model's own.
    merged = {
        key: [one for one in patches if isinstance(one[1], list) or one[2] != 1.0]
        for key, patches in patcher.patches.items()
    }
    return {key: patches for key, patches in merged.items() if patches}


def _add(digest: hashlib._Hash, value: object) -> None:
    """Add the parts of a patch to a digest, in a way that is the same in every process."""
    if isinstance(value, QuantizedTensor):
        _add(digest, [value._qdata, value._params.scale])
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(_sample(value.data).numpy().tobytes())
    elif isinstance(value, WeightAdapterBase):
        _add(digest, [value.name, value.weights])
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} of ".encode())
        for one in value:
            _add(digest, one)
    elif callable(value):
        digest.update(b"function;")  # a function's name may change with ComfyUI's version
    else:
        digest.update(f"{value!r};".encode())
