"""A sketch of a layer's inputs: it gives their second moments, and holds none of the inputs.

S is the sum of r x^T over rows x, where r has SIZE new random signs for each row. Then S^T S / SIZE
is an unbiased estimate of the sum of x x^T. S is a sum, so sketches can be added up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

SIZE = 128
"""Rows of a sketch. The relative error of the estimate is about 1 / sqrt(SIZE)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sketch:
    """Sums of a layer's inputs times random signs. Layers with the same input have the same object.

    Attributes:
        matrix: (SIZE, in channels) CPU tensor, FP32; or BF16 if it comes from a GPU.
        rows: number of channel vectors that were added.
    """

    matrix: torch.Tensor
    rows: int

    def merge(self, other: Sketch) -> Sketch:
        """Return the sums of both.

        Raises:
            ValueError: they have different shapes.
        """
        if self.matrix.shape != other.matrix.shape:
            raise ValueError(
                f"cannot add a sketch of shape {tuple(other.matrix.shape)} "
                f"to one of shape {tuple(self.matrix.shape)}"
            )
        return Sketch(self.matrix + other.matrix, self.rows + other.rows)


def merge_sketches(
    one: Mapping[str, Sketch | None], other: Mapping[str, Sketch | None]
) -> dict[str, Sketch]:
    """Return the sums of both, layer by layer.

    Layers share a sketch only if they share one in both. If they share one in only one of them,
    they had different inputs in the other.

    Raises:
        ValueError: a layer has different numbers of input channels in the two.
    """
    sums: dict[tuple[int, int], Sketch] = {}
    merged = {}
    for name in dict.fromkeys((*one, *other)):
        pair = one.get(name), other.get(name)
        known = [sketch for sketch in pair if sketch is not None]
        key = id(pair[0]), id(pair[1])
        if known and key not in sums:
            try:
                sums[key] = known[0].merge(known[1]) if len(known) == 2 else known[0]
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        if known:
            merged[name] = sums[key]
    return merged
