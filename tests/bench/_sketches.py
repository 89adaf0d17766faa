"""Sketches of a model's inputs, recorded as passive recording does: some layers in each forward."""

from __future__ import annotations

import functools

import torch
from hswq.calibration import monitored_layers
from hswq.calibration.rotation import Rotation

SIZE = 128
ROWS = 256  # of an input, at random
SHARE = 0.05  # of the layers


class Sketches:
    """Records while its block runs.

    Attributes:
        found: (SIZE, channels) FP32 by layer name.
    """

    def __init__(self, model: torch.nn.Module, seed: int = 0) -> None:
        """Take the diffusion model."""
        self.found: dict[str, torch.Tensor] = {}
        self._model, self._layers = model, monitored_layers(model)
        self._rotation = Rotation(list(self._layers), SHARE, seed)
        self._random = torch.Generator().manual_seed(seed)
        self._measured: frozenset[str] = frozenset()
        self._hooks: list = []

    def __enter__(self) -> Sketches:
        self._hooks.append(self._model.register_forward_pre_hook(self._next))
        for name, layer in self._layers.items():
            hook = functools.partial(self._add, name)
            self._hooks.append(layer.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _next(self, *_: object) -> None:
        self._measured = frozenset(self._rotation.next())

    def _add(self, name: str, _: torch.nn.Module, args: tuple) -> None:
        if name not in self._measured:
            return
        values = args[0].detach()
        values = values.movedim(1, -1) if values.ndim == 4 else values
        rows = values.reshape(-1, values.shape[-1])
        chosen = torch.randperm(len(rows), generator=self._random)[:ROWS].to(rows.device)
        signs = torch.randint(0, 2, (SIZE, len(chosen)), generator=self._random) * 2.0 - 1
        added = signs.to(rows.device) @ rows[chosen].to(torch.float32)
        self.found[name] = self.found.get(name, 0) + added
