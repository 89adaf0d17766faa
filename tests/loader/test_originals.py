"""By which checksum a patched weight is told from the one that was loaded."""

from __future__ import annotations

import pytest
import torch
from hswq.loader.engine.originals import _checksum

SHAPES = [(16, 24), (6, 4, 3, 3), (1, 8), (5, 7), (8, 1)]


def data_of(shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def by_column(data: torch.Tensor) -> torch.Tensor:
    """Return the same numbers in another order in memory."""
    return data.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestChecksum:
    def test_changes_with_every_bit(self, shape):
        data = data_of(shape)
        for at in range(data.numel()):
            for bit in range(8):
                changed = data.clone()
                changed.view(-1)[at] ^= 1 << bit
                assert _checksum(changed) != _checksum(data)

    def test_changes_if_rows_or_columns_are_exchanged(self, shape):
        data = data_of(shape)
        for axis in (0, 1):
            changed = data.flip(axis)
            assert changed.equal(data) == (_checksum(changed) == _checksum(data)).item()

    def test_is_the_same_wherever_the_bytes_are(self, shape, device):
        data = data_of(shape)
        shifted = torch.cat([data.new_zeros(3), data.flatten()])[3:].view(shape)
        for same in (shifted, by_column(data), data.to(device), data.view(torch.int8)):
            assert _checksum(same).cpu() == _checksum(data)
