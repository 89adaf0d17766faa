"""The one patch of ComfyUI that this extension makes: around `CFGGuider.outer_sample`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from comfy import samplers
from comfy.model_patcher import ModelPatcher


class SamplingPatch:
    """Runs a context around every sampling, also if other extensions patch the same method."""

    def __init__(
        self,
        around: Callable[[ModelPatcher, torch.Tensor, tuple, dict], AbstractContextManager],
        after: Callable[[ModelPatcher, torch.Tensor], None],
    ) -> None:
        """Start without a patch.

        Args:
            around: is called with each sampling's MODEL, noise and other arguments.
            after: is called with its MODEL and result.
        """
        self._around, self._after = around, after
        self._ours: Callable | None = None
        self._before: Callable | None = None
        self._above: Callable | None = None
        self._guiders: set[int] = set()

    def install(self) -> None:
        """Wrap the method that ComfyUI calls now, unless it calls ours already. Idempotent.

        If the method is not ours, another extension has either wrapped ours, or restored the one
        from before. Only a call shows which. So it is wrapped again, and a second call of ours
        within the first does nothing.
        """
        if samplers.CFGGuider.outer_sample not in (self._ours, self._above):
            self._before = samplers.CFGGuider.outer_sample
            self._ours = samplers.CFGGuider.outer_sample = self._wrapped(self._before)

    def remove(self) -> None:
        """Restore the method from before, unless another extension has wrapped ours since."""
        if self._ours is not None and samplers.CFGGuider.outer_sample is self._ours:
            samplers.CFGGuider.outer_sample = self._before
            self._ours = None

    def _wrapped(self, inner: Callable) -> Callable:
        @functools.wraps(inner)
        def outer_sample(
            guider: samplers.CFGGuider, noise: torch.Tensor, *args, **kwargs
        ) -> torch.Tensor:
            if id(guider) in self._guiders:
                return inner(guider, noise, *args, **kwargs)
            self._above = samplers.CFGGuider.outer_sample
            self._guiders.add(id(guider))
            try:
                with self._around(guider.model_patcher, noise, args, kwargs):
                    latent = inner(guider, noise, *args, **kwargs)
                self._after(guider.model_patcher, latent)
                return latent
            finally:
                self._guiders.discard(id(guider))

        return outer_sample
