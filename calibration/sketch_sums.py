"""Running sketches of a model's inputs, on the devices where its layers run."""

from __future__ import annotations

import random

import torch

from . import noise, sketch_kernels
from .sketch import SIZE, Sketch

PICKED = 64
"""Most channel vectors of a call that are added. 512 give no better rounding: vectors of one call
are much alike, so that the number of calls matters.
"""


class DeviceSketches:
    """Sketches of all inputs on one device. Each is created when something is first added to it.

    On a GPU they are BF16, which has the range of FP32 in half the memory. Its rounding of 0.4% is
    small against the 9% by which a sketch of 128 rows is off anyway.
    """

    def __init__(self, device: torch.device, share: float = 1.0, seed: int | None = None) -> None:
        """Take the device, the share of the calls to add, and a seed for reproducible choices."""
        self._device = device
        self._share = share
        self._random = random.Random(seed)  # its own, so that other random numbers do not change
        self._matrices: dict[str, torch.Tensor] = {}
        self._rows: dict[str, int] = {}

    def add(self, name: str, inputs: torch.Tensor, channels: int) -> None:
        """Add some channel vectors of a call's input, or none if its shape is another.

        Args:
            name: of the layer.
            inputs: (B, C, H, W), (B, T, C) or (B, C); other shapes are ignored.
            channels: C, as the layer says.
        """
        axis = {2: 1, 3: 2, 4: 1}.get(inputs.ndim)
        if axis is None or inputs.shape[axis] != channels:
            return
        if self._random.random() >= self._share:
            return
        if name not in self._matrices:
            self._matrices[name] = self._zeros(channels)
            self._rows[name] = 0
        seed = self._random.getrandbits(32)
        self._rows[name] += add_rows(self._matrices[name], inputs.detach(), seed)

    def read(self) -> dict[str, Sketch]:
        """Wait for the device, and return all sketches by layer name."""
        return {
            name: Sketch(matrix.to("cpu", copy=True), self._rows[name])
            for name, matrix in self._matrices.items()
        }

    def _zeros(self, channels: int) -> torch.Tensor:
        dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        with torch.inference_mode(False):
            return torch.zeros(SIZE, channels, dtype=dtype, device=self._device)


def add_rows(matrix: torch.Tensor, inputs: torch.Tensor, seed: int) -> int:
    """Add some rows of an input, each times its random signs, and return how many.

    Args:
        matrix: (SIZE, C) on the input's device; it is changed.
        inputs: (B, C, H, W), (B, T, C) or (B, C).
        seed: 32 bits, different for each call.
    """
    positions = inputs.numel() // matrix.shape[1]
    count = min(PICKED, positions)
    rows = sketch_kernels.rows_of(inputs)
    if rows is not None and sketch_kernels.usable(matrix.device):
        sketch_kernels.add_rows(matrix, inputs, rows, count, seed)
    elif count:
        add_rows_with_torch(matrix, inputs, positions, count, seed)
    return count


def add_rows_with_torch(
    matrix: torch.Tensor, inputs: torch.Tensor, positions: int, count: int, seed: int
) -> None:
    """Add `count` of an input's `positions` rows, as the kernel does."""
    picked = noise.picks(seed, positions, count, inputs.device)
    rows = _vectors(inputs, picked).to(torch.float32)
    signs = noise.signs(seed, count, matrix.shape[0], inputs.device)
    # The in-place product, because autocast would compute the other one in 16 bit.
    if matrix.dtype == torch.float32:
        matrix.addmm_(signs, rows)
    else:
        matrix += torch.zeros(matrix.shape, device=matrix.device).addmm_(signs, rows)


def _vectors(inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return (positions, C): an input's channel vectors at some positions."""
    if inputs.ndim == 2:
        return inputs[positions]
    if inputs.ndim == 3:
        tokens = inputs.shape[1]
        return inputs[positions // tokens, positions % tokens]
    height, width = inputs.shape[2:]
    image, place = positions // (height * width), positions % (height * width)
    return inputs[image, :, place // width, place % width]
