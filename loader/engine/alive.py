"""A list of the quantized models in memory, which does not keep any of them in memory."""

from __future__ import annotations

import dataclasses
import threading
import weakref

from comfy.model_base import BaseModel

from ...quant import Plan
from ..host.events import changed

ATTACHMENT = "hswq"
"""Key of the Plan among a ModelPatcher's attachments."""


@dataclasses.dataclass(frozen=True)
class Alive:
    """A quantized model in memory.

    Attributes:
        name: of its file.
        fingerprint: of the 16-bit weights that it was made from.
        mode: name of its number format.
        keep_ratio: share of its layers that are 16 bit.
        samples: number of latent images that its statistics come from.
        plan: by which it was made.
    """

    name: str
    fingerprint: str
    mode: str
    keep_ratio: float
    samples: int
    plan: Plan


_models: weakref.WeakKeyDictionary[BaseModel, Alive] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def note_alive(model: BaseModel, name: str, fingerprint: str, plan: Plan) -> None:
    """List a quantized model for as long as it is in memory, and tell the panel."""
    with _lock:
        _models[model] = Alive(
            name, fingerprint, plan.number_format.name, _kept_share(plan), plan.samples, plan
        )
    weakref.finalize(model, changed).atexit = False  # at exit the panel is gone already
    changed()


def alive_models() -> dict[str, Alive]:
    """Return the quantized models by fingerprint; of several with the same, the newest."""
    with _lock:
        return {alive.fingerprint: alive for alive in list(_models.values())}


def _kept_share(plan: Plan) -> float:
    """Return keep_ratio, or the actual share if the file or another selection decided."""
    chosen = getattr(plan.selection, "keep_ratio", None)
    return len(plan.kept) / max(1, len(plan.layers)) if chosen is None else chosen
