"""The INT8 number format: whole numbers from -127 to 127 with a scale for each output row.

Seven bits for a row's weights, where FP8 has three bits for each power of two: without heavy tails
that is a quarter of FP8's error, for four bytes a row more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import kernels, search_kernels
from .fp8 import quotient, scalar
from .storing import Storing, for_rows

INT8_MAX = 127.0
"""Largest magnitude that is stored; -128 is not, so that negating a weight negates its number."""

SHARES = 128
"""A row is clipped at a whole number of these parts of its largest weight."""

STEPS = (32, 16, 8, 4, 2, 1)  # parts, by which the search narrows
_LEAST = 1e-30
"""A row whose weights are all smaller counts as zero: 127 / amax would overflow FP32."""
_ALL_ZERO_AMAX = 1e-7
_PIECE = 1 << 17  # weights that are searched at a time on a CPU: as many as its cache holds


class RowSearch(NamedTuple):
    """What a search found about a weight's rows.

    Attributes:
        shares: (out,) uint8, at how many parts of its largest weight each row is clipped best.
        largest: (out,) FP32, each row's largest finite magnitude.
        errors: (out,) FP32, weighted squared error of each row.
        powers: (out,) FP32, weighted squares of each row.
        finite: bool scalar tensor, whether every weight is a finite number.
    """

    shares: torch.Tensor
    largest: torch.Tensor
    errors: torch.Tensor
    powers: torch.Tensor
    finite: torch.Tensor


def search_rows(weight: torch.Tensor, importance: torch.Tensor | None) -> RowSearch:
    """Search for every row where to clip it for the least importance-weighted error.

    The error of a row clipped at a is `sum I (q(w, a) - w)^2`, with I the importance of a weight's
    input channel. Quarters of the largest weight are tried, then ever finer steps around the best.
    Of equals the one tried first stays, and larger ones come first.

    Args:
        weight: (out, in, ...) of any floating dtype, on any device. What is not finite counts as 0.
        importance: (in,) of the input channels, None for all 1.
    """
    weight = weight.detach().contiguous()
    channels = weight.shape[1]
    if importance is None:
        importance = torch.ones(channels)
    shares = importance.to(weight.device, torch.float32).contiguous()
    if kernels.usable(weight.device):
        return RowSearch(*search_kernels.search_rows(weight, shares, SHARES, STEPS))
    places = weight[0, 0].numel()
    rows = weight.flatten(1)
    height = max(1, _PIECE // rows.shape[1]) if weight.device.type == "cpu" else len(rows)
    found = [_search_part(part, shares.repeat_interleave(places)) for part in rows.split(height)]
    *columns, finite = zip(*found, strict=True)
    return RowSearch(*map(torch.cat, columns), torch.stack(finite).all())


def _search_part(rows: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what search_rows does for rows (rows, n), with the importance (n,) of each column."""
    finite = rows.isfinite().all()
    magnitude = rows.nan_to_num(0, 0, 0).to(torch.float32).abs()
    largest = magnitude.amax(1)
    parts = _positive(largest)[:, None] / SHARES

    def errors_at(shares: torch.Tensor) -> torch.Tensor:
        amax = parts * shares[:, None]
        rounded = (magnitude * quotient(INT8_MAX, amax)).round_().clamp_(max=INT8_MAX)
        return (rounded * quotient(amax, INT8_MAX)).sub_(magnitude).square_() @ importance

    best = torch.full_like(largest, SHARES)
    errors = errors_at(best)
    for share in range(SHARES - STEPS[0], 0, -STEPS[0]):
        tried = torch.full_like(best, share)
        best, errors = _better(best, errors, tried, errors_at(tried))
    for step in STEPS[1:]:
        for tried in ((best + step).clamp(max=SHARES), best - step):
            best, errors = _better(best, errors, tried, errors_at(tried))
    return best.to(torch.uint8), largest, errors, magnitude.square() @ importance, finite


def _better(
    best: torch.Tensor, errors: torch.Tensor, tried: torch.Tensor, found: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    better = found < errors
    return torch.where(better, tried, best), torch.where(better, found, errors)


def row_amax(
    weight: torch.Tensor, amax: float | torch.Tensor, shares: torch.Tensor | bytes | None
) -> torch.Tensor:
    """Return where each row of a weight is clipped: (out,) FP32 on its device, above 0.

    Args:
        weight: (out, in, ...).
        amax: of the layer, that of the row which is clipped highest. Where it is another than the
            shares say, all rows move by the same factor.
        shares: see RowSearch; None clips each row at its largest weight.

    Raises:
        ValueError: the shares are of another weight.
    """
    magnitude = weight.detach().flatten(1).nan_to_num(0, 0, 0).to(torch.float32).abs()
    rows = _positive(magnitude.amax(1))
    if shares is not None:
        if isinstance(shares, bytes):
            shares = torch.frombuffer(bytearray(shares), dtype=torch.uint8)
        if len(shares) != len(rows):
            raise ValueError(
                f"a plan for a layer of {len(shares)} rows cannot clip one of {len(rows)}"
            )
        rows = rows / SHARES * shares.to(rows.device, torch.float32)
    return rows * (scalar(amax, rows.device) / rows.amax())


def layer_amax(found: RowSearch) -> torch.Tensor:
    """Return the amax of a layer (FP32 scalar tensor), by which row_amax gives back its rows."""
    return (_positive(found.largest) / SHARES * found.shares).amax()


def storing_of(
    weight: torch.Tensor,
    amax: float | torch.Tensor,
    shares: torch.Tensor | bytes | None,
    scale: torch.Tensor | None = None,
) -> Storing:
    """Return how a weight is stored. The arguments are a Clipping's."""
    if scale is None:
        scale = quotient(row_amax(weight, amax, shares), INT8_MAX)[:, None]
    scale = scale.to(weight.device)
    # The factor comes from the scale alone, by which a weight is stored again after a patch.
    factor = quotient(1.0, for_rows(scale, weight))
    return Storing(factor, INT8_MAX, scale, torch.float32, torch.int8)


def quantize(
    weight: torch.Tensor,
    amax: float | torch.Tensor,
    shares: torch.Tensor | bytes | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip each row of a weight and store it as INT8; nan becomes 0.

    Args:
        weight: (out, in, ...) of any floating dtype.
        amax, shares: as of row_amax.

    Returns:
        The int8 tensor in the weight's shape and on its device, and its weight_scale there:
        (out, 1) FP32, as ComfyUI's int8_tensorwise has it.
    """
    return stored(weight, storing_of(weight, amax, shares))


def stored(weight: torch.Tensor, storing: Storing) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantize` does, of a weight that is stored in a known way."""
    values = storing.castable(storing.scaled(weight.detach()))
    return values.nan_to_num_(0).to(torch.int8), storing.scale


def with_scale(weight: torch.Tensor, scale: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return a weight as INT8 by a scale that is known; nan becomes 0.

    Args:
        weight: (out, in, ...) of any floating dtype.
        scale: (out, 1) FP32 on its device.
        seed: of rounding up or down by chance, as often as keeps the mean; 0 rounds to the nearest.
    """
    values = storing_of(weight, 0.0, None, scale).scaled(weight)
    if seed:
        device = values.device if values.is_cuda else torch.device("cpu")  # others lack generators
        numbers = torch.Generator(device).manual_seed(seed)
        chance = torch.rand(values.shape, generator=numbers, device=device)
        values = values.add_(chance.to(values.device)).floor_()
    return values.round_().clamp_(-INT8_MAX, INT8_MAX).nan_to_num_(0).to(torch.int8)


def dequantize(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `quantized * scale` in `dtype`, multiplied in FP32.

    Args:
        quantized: int8 (out, in, ...).
        scale: (out, 1) FP32, weight_scale.
        dtype: of the result.
    """
    if not torch.compiler.is_compiling() and kernels.usable(quantized.device):
        return kernels.dequantize_rows(quantized, scale, dtype)
    return (quantized.to(torch.float32) * for_rows(scale, quantized)).to(dtype)


def _positive(largest: torch.Tensor) -> torch.Tensor:
    return torch.where(largest > _LEAST, largest, _ALL_ZERO_AMAX)
