"""What rounding one column makes the next one want: GPTQ's compensation, from a sketch of inputs.

GPTQ (Frantar et al. 2022) rounds a weight W column by column. After each it moves all columns that
are not yet rounded to where the output's error is least. That takes the inverse of a matrix of
channels x channels. A sketch S (K x channels) knows the inputs' second moments by S^T S alone, so
all that the columns rounded so far did to the output is u = (W - Q) S^T, K numbers a row. By the
matrix inversion lemma, the column j, moved as GPTQ would have moved it by then, is

    w_j + u . a_j   with   a_j = (lambda I + sum over the columns i from j on of s_i s_i^T)^-1 s_j

which is exactly what GPTQ gives for H = S^T S + lambda I. No matrix is wider than K. Once all are
rounded, each can be rounded again to where it makes up best for all others: coordinate descent.
"""

from __future__ import annotations

import dataclasses

import torch

_DAMPING = 0.07
_BLOCK = 64  # columns


@dataclasses.dataclass(frozen=True, eq=False)
class Feedback:
    """How the error of a weight's rounded columns changes the next column, for all its rows.

    With K a sketch's rows, and columns in the order in which they are to be rounded:

    Attributes:
        order: (C,) int64, numbers of the columns, those of the largest inputs first.
        answers: (C, K) FP32, what a column adds to itself for each part of the error so far.
        directions: (C, K) FP32, what a column's own error adds to each part of it.
        shares: (C, 1) FP32, what a column makes up for alone, when all others are rounded: times
            its direction, this is its answer then.
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
        damping: lambda, as a share of the columns' mean |s_j|^2. It stands for what the sketch
            has not seen.
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

    Blocks do not wait for one another. In each, with B its columns, A = I + the sum over all later
    blocks, A = L L^T, Y = L^-1 B, and I + Y^T Y = R R^T with R upper triangular: the trailing
    parts of R are those of the columns from j on, whence a = A^-1 B R^-T, each over R's diagonal.
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
    """Return the lower Cholesky factors of I plus some Grams; I keeps them from being singular."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky_ex(gram + identity).L
