"""Measuring how a model's output changes if one layer alone is quantized, in a sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...quant import LARGEST_EFFECT
from .network import own_layers, own_network
from .replay import Replay

_KEY = "hswq.effect"

Quantized = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a layer's name and float weight; returns the float weight that it has when quantized."""


class EffectMeasurer:
    """Measures a model's layers in one step of a sampling, one forward for each.

    The model's own weights are not changed. The layer computes with another weight, which one of
    ComfyUI's functions on weights returns, so it works in every memory mode.

    Attributes:
        effects: by layer name (see store.effects.Effects); filled while it measures.
    """

    def __init__(
        self,
        quantized: Quantized,
        known: Mapping[str, float],
        measured: Callable[[Mapping[str, float], int, int], None] = lambda *_: None,
    ) -> None:
        """Take how layers are quantized, and effects that need not be measured again.

        Args:
            quantized: returns a layer's weight as it is when quantized.
            known: effects that need not be measured again, by layer name.
            measured: is called after each layer, with the effects so far, how many layers are done
                and how many there are.
        """
        self.effects = dict(known)
        self._quantized, self._measured = quantized, measured
        self._step = 0

    def on(self, patcher: ModelPatcher, step: int) -> ModelPatcher:
        """Return a clone that measures in one step of its sampling, counted from 0."""

        def predict(executor: Callable, *args, **kwargs) -> torch.Tensor:
            now, self._step = self._step, self._step + 1
            if now != step:
                return executor(*args, **kwargs)
            # Not the clone below: it would hold itself until garbage collection, and then ComfyUI
            # takes its model for leaked.
            sampled = executor.class_obj.model_patcher
            return self._measure(sampled, lambda: executor(*args, **kwargs))

        clone = patcher.clone()
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _KEY, predict)
        return clone

    def _measure(self, patcher: ModelPatcher, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        layers, replay = own_layers(patcher), Replay()
        with replay.watching(own_network(patcher)):
            expected = forward()
        power = expected.square().sum(dtype=torch.float64).item()
        if not 0 < power < math.inf:
            raise ValueError("the model's output is not finite, so nothing can be compared with it")
        for number, (name, layer) in enumerate(layers.items(), 1):
            if name not in self.effects:
                memory.throw_exception_if_processing_interrupted()
                with replay.until(name), self._in_place(name, layer):
                    change = forward() - expected
                found = change.square().sum(dtype=torch.float64).item() / power
                self.effects[name] = found if found < LARGEST_EFFECT else LARGEST_EFFECT
            self._measured(self.effects, number, len(layers))
        return expected

    @contextmanager
    def _in_place(self, name: str, layer: torch.nn.Module) -> Iterator[None]:
        """Let a layer compute with its quantized weight, for the length of the block."""
        found: list[torch.Tensor] = []

        def function(weight: torch.Tensor) -> torch.Tensor:
            if not found:  # in each forward of a step it is the same
                found.append(self._quantized(name, weight).to(weight.dtype))
            return found[0]

        functions = layer.weight_function
        layer.weight_function = [*functions, function]
        try:
            yield
        finally:
            layer.weight_function = functions
