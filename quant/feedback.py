"""How the errors of rounded columns move the next one: GPTQ's compensation, from a sketch.

GPTQ (Frantar et al. 2022) rounds a weight W column by column. After each column it moves all
columns that are not rounded yet to where the output's error is least. That needs the inverse of a
matrix of channels x channels. A sketch S (K x channels) describes the inputs by S^T S only. So the
effect of the columns rounded so far on the output is u = (W - Q) S^T, which is K numbers a row. By
the matrix inversion lemma, GPTQ would have moved column j to

    w_j + u . a_j   with   a_j = (lambda I + sum over the columns i from j on of s_i s_i^T)^-1 s_j

This is exactly GPTQ's result for H = S^T S + lambda I, and no matrix is wider than K. When all
columns are rounded, each can be rounded once more to cancel the errors of all others (coordinate
descent).
"""

from __future__ import annotations

import dataclasses

import torch

_DAMPING = 0.07
_BLOCK = 64  # columns


@dataclasses.dataclass(frozen=True, eq=False)
class Feedback:
    """How the error of a weight's rounded columns changes the next column, for all its rows.

    K is the number of a sketch's rows. Columns are in the order in which they are rounded.

    Attributes:
        order: (C,) int64, numbers of the columns; those with the largest inputs come first.
        answers: (C, K) FP32, how far a column moves for each part of the error so far.
        directions: (C, K) FP32, what a column's own error adds to each part of the error.
        shares: (C, 1) FP32; times its direction, this is a column's answer when all others are
            rounded already.
    """

    order: torch.Tensor
    answers: torch.Tensor
    directions: torch.Tensor
    shares: torch.Tensor


def feedback_of(sketch: torch.Tensor, damping: float = _DAMPING) -> Feedback:
    """Return how columns answer each other's errors.

    Args:
        sketch: (K, C) floating, finite and not all 0, on the CPU or a GPU that has FP64. Its scale
            does not matter.
        damping: lambda, as a share of the columns' mean |s_j|^2. It accounts for inputs that are
            not in the sketch.
    """
    columns = sketch.mT.to(torch.float64)
    powers = columns.square().sum(1)
    order = powers.argsort(descending=True, stable=True)
    columns = columns[order] / powers.mean().sqrt()
    answers = _answers(columns / damping**0.5) / damping**0.5
    shares = 1 / (columns.square().sum(1, keepdim=True) + damping)
    return Feedback(order, *(part.to(torch.float32) for part in (answers, columns, shares)))


def _answers(columns: torch.Tensor) -> torch.Tensor:
    """Return (C, K) FP64: a_j for lambda = 1, of the columns (C, K).

    All blocks are computed at once. For a block with columns B, let A = I + the sum over all later
    blocks, A = L L^T, Y = L^-1 B, and I + Y^T Y = R R^T with R upper triangular. The trailing part
    of R from column j on belongs to the columns from j on, so that a = A^-1 B R^-T, with each
    column divided by R's diagonal.
    """
    count, size = columns.shape
    blocks = torch.nn.functional.pad(columns, (0, 0, 0, -count % _BLOCK)).view(-1, _BLOCK, size)
    sums = blocks.mT @ blocks
    later = sums.flip(0).cumsum(0).flip(0) - sums
    lower = _factor(later)
    inner = torch.linalg.solve_triangular(lower, blocks.mT, upper=False)
    upper = _factor((inner.mT @ inner).flip(1, 2)).flip(1, 2)
    outer = torch.linalg.solve_triangular(lower.mT, inner, upper=True)
    answers = torch.linalg.solve_triangular(upper.mT, outer, upper=False, left=False)
    answers = answers / upper.diagonal(dim1=1, dim2=2)[:, None, :]
    return answers.mT.reshape(-1, size)[:count]


def _factor(gram: torch.Tensor) -> torch.Tensor:
    """Return the lower Cholesky factors of I plus Gram matrices, which is never singular."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky_ex(gram + identity).L
