"""Which FP8 models are in memory, known without keeping them there."""

from __future__ import annotations

import dataclasses
import threading
import weakref

from comfy.model_base import BaseModel

from ...quant import Plan
from ..host.events import changed


@dataclasses.dataclass(frozen=True)
class Alive:
    """An FP8 model in memory.

    Attributes:
        name: of its file.
        fingerprint: of the weights that it was made of.
        mode: name of the number format.
        keep_ratio: share of the layers in 16 bit.
        samples: that its statistics come from.
    """

    name: str
    fingerprint: str
    mode: str
    keep_ratio: float
    samples: int


_models: weakref.WeakKeyDictionary[BaseModel, Alive] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def note_alive(model: BaseModel, name: str, fingerprint: str, plan: Plan) -> None:
    """Know a quantized model for as long as it lives."""
    with _lock:
        _models[model] = Alive(
            name, fingerprint, plan.number_format.name, _kept_share(plan), plan.samples
        )
    weakref.finalize(model, changed).atexit = False
    changed()


def alive_models() -> dict[str, Alive]:
    """Return the FP8 models in memory by fingerprint; of several the one made last."""
    with _lock:
        return {alive.fingerprint: alive for alive in list(_models.values())}


def _kept_share(plan: Plan) -> float:
    """Return keep_ratio, or what it comes to where the file or another selection decided."""
    chosen = getattr(plan.selection, "keep_ratio", None)
    return len(plan.kept) / max(1, len(plan.layers)) if chosen is None else chosen
