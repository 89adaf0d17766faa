"""Random signs and picks that are a function of a seed: the same on a CPU, a GPU and in a kernel.

Nobody else's random numbers change by them, and no state has to wait on a device. Every row has
some words of 32 bits, hashed from the seed, the row and the word.
"""

from __future__ import annotations

import torch

FIRST, SECOND = 0x7FEB352D, 0x846CA68B
"""Factors of the hash of 32 bits by Chris Wellons ("lowbias32")."""

_MASK = 0xFFFFFFFF


def picks(seed: int, positions: int, count: int, device: torch.device) -> torch.Tensor:
    """Return (count,) int64 positions, one at random out of each of `count` equal stretches.

    Every position has the same chance. At most 2**31 positions, and no fewer than `count`.
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
