"""Random signs and picks that depend only on a seed: equal on a CPU, on a GPU and in a kernel.

They do not touch torch's random numbers, by which ComfyUI makes pictures, and need no state on a
device. Each row has several words of 32 bits, hashed from the seed and the two numbers.
"""

from __future__ import annotations

import torch

FIRST, SECOND = 0x7FEB352D, 0x846CA68B
"""Factors of "lowbias32", a hash of 32 bits by Chris Wellons."""

_MASK = 0xFFFFFFFF


def picks(seed: int, positions: int, count: int, device: torch.device) -> torch.Tensor:
    """Return (count,) int64: a random position from each of `count` equal parts of `positions`.

    Every position has the same chance. `positions` is at least `count` and at most 2**31.
    """
    row = torch.arange(count, device=device)
    chance = _words(seed, row, torch.zeros_like(row)) >> 8
    return (row * positions + (chance * positions >> 24)) // count


def signs(seed: int, count: int, size: int, device: torch.device) -> torch.Tensor:
    """Return (size, count) FP32 of -1 and 1: `size` signs, a multiple of 32, for each row."""
    row, word = torch.arange(count, device=device), torch.arange(size // 32, device=device)
    words = _words(seed, row[None, :], 1 + word[:, None])
    bits = words[:, None, :] >> torch.arange(32, device=device)[None, :, None] & 1
    return (1 - 2 * bits).view(size, count).to(torch.float32)


def _words(seed: int, row: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """Return 32 random bits, as int64, for every row (below 2**24) and word (below 256)."""
    return _mixed(_mixed(row * 256 + word) ^ seed)


def _mixed(value: torch.Tensor) -> torch.Tensor:
    value = value ^ value >> 16
    value = value * FIRST & _MASK
    value = value ^ value >> 15
    value = value * SECOND & _MASK
    return value ^ value >> 16
