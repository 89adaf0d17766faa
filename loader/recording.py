"""Recording the Dual Monitor's statistics in the background of any sampling."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..calibration import DualMonitor, Statistics
from . import store
from .patchers import identity, is_quantized

WRAPPER = "hswq.calibration"
"""Key of the calibration node's wrapper; passive recording leaves such a model to it."""


class Recorder:
    """Records every sampling once installed; the one patch of ComfyUI that this extension makes.

    Attributes:
        enabled: whether samplings are recorded.
        reasons: why a model (by its class or file name) was last not recorded.
    """

    def __init__(self) -> None:
        """Start uninstalled."""
        self.enabled = True
        self.reasons: dict[str, str] = {}
        self._original: Callable | None = None
        self._patched: Callable | None = None

    def install(self) -> None:
        """Wrap `CFGGuider.outer_sample`, through which every sampler goes. Idempotent."""
        if self._original is not None:
            return
        self._original = original = comfy.samplers.CFGGuider.outer_sample

        @functools.wraps(original)
        def outer_sample(guider, noise, *args, **kwargs):
            with self._recording(guider.model_patcher, noise):
                return original(guider, noise, *args, **kwargs)

        self._patched = comfy.samplers.CFGGuider.outer_sample = outer_sample

    def remove(self) -> None:
        """Put ComfyUI's own function back, unless somebody wrapped ours since: then fall silent."""
        if self._original is not None and (
            comfy.samplers.CFGGuider.outer_sample is self._patched
        ):
            comfy.samplers.CFGGuider.outer_sample = self._original
            self._original = self._patched = None
        else:
            self.enabled = False

    @contextlib.contextmanager
    def _recording(self, patcher: ModelPatcher, noise: torch.Tensor) -> Iterator[None]:
        target = self._target(patcher)
        if target is None:
            yield
            return
        path, fingerprint = target
        with record(patcher, noise.shape[0], fingerprint, store.PASSIVE_SESSION, path):
            yield

    def _target(self, patcher: ModelPatcher) -> tuple[str, str] | None:
        """Return path and fingerprint of a model to record, None with a reason noted."""
        try:
            if not self.enabled or WRAPPER in patcher.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
                return None
            reason, target = unrecordable(patcher), None
            if reason is None:
                target = identity(patcher)
                reason = "it is a merge or was not loaded from a file" if target is None else None
            if target is not None and _complete(target[1]):
                return None
        except Exception as error:  # the picture must be made whatever happens here
            reason, target = f"recording failed: {error}", None
            logging.warning("HSWQ: %s", reason, exc_info=True)
        name = type(patcher.model).__name__ if target is None else os.path.basename(target[0])
        if reason is not None and self.reasons.get(name) != reason:
            logging.info("HSWQ: %s is not recorded: %s", name, reason)
        self.reasons[name] = reason or "recording"
        return target


def unrecordable(patcher: ModelPatcher) -> str | None:
    """Return why a model's statistics would not be those of 16-bit weights, None if they are."""
    if is_quantized(patcher):
        return "its weights are quantized"
    if patcher.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile"):
        return "it is compiled"
    return None


def _complete(fingerprint: str) -> bool:
    known = store.statistics_of(fingerprint)
    return known is not None and known.samples >= store.TARGET_SAMPLES


@contextlib.contextmanager
def record(
    patcher: ModelPatcher,
    samples: int,
    fingerprint: str | None,
    session: str,
    model_name: str,
    saved: Callable[[Statistics], None] = lambda _: None,
) -> Iterator[None]:
    """Measure one sampling and add it to the model's statistics file when it has succeeded.

    Whatever goes wrong in measuring or saving is logged; the sampling goes on.

    Args:
        patcher: whose diffusion model runs in the block.
        samples: latent images in the sampling.
        fingerprint: of the model's file, None if it has none.
        session: of the statistics file.
        model_name: for people.
        saved: is called with the file's new content.
    """
    with DualMonitor(patcher.model.diffusion_model) as monitor:
        yield
    try:
        delta = monitor.statistics()
        if not all(layer.finite for layer in delta.values()):
            logging.warning("HSWQ: not recorded: the sampling produced values that are not finite")
        elif delta:
            delta = Statistics(delta, {**delta.meta, "samples": samples})
            saved(store.add_statistics(delta, fingerprint, session, os.path.basename(model_name)))
    except Exception as error:
        logging.warning("HSWQ: this sampling was not recorded: %s", error, exc_info=True)


recorder = Recorder()
