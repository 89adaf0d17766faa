"""Triton kernels of the search. Plain torch takes many launches for the same results.

They can be used where `kernels.usable` says so.
"""

from __future__ import annotations

import torch

from .launching import launch, tl, triton

_BLOCK = 4096
_ROW_BLOCK = 1024  # values of a row that its program reads at a time
_COPIES = 64  # of the histogram, so that two programs rarely add to the same address at once


def largest_magnitude(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest finite |W| and whether all weights are finite, in one launch.

    Args:
        weight: contiguous floating tensor on a GPU.

    Returns:
        FP32 scalar tensor, bool scalar tensor.
    """
    found = torch.zeros(2, dtype=torch.int32, device=weight.device)
    count = weight.numel()
    programs = (count + _BLOCK - 1) // _BLOCK
    launch(_largest_magnitude, (programs,), weight, found, count, BLOCK=_BLOCK, num_warps=8)
    return found.view(torch.float32)[0], found[1] == 0


def add_to_histogram(
    weight: torch.Tensor, maximum: torch.Tensor, importance: torch.Tensor, bins: int
) -> torch.Tensor:
    """Return (bins,) float64: the importance of every weight added to the bin of its magnitude.

    Args:
        weight: contiguous (out, in, ...) floating tensor on a GPU. A value that is not finite
            counts as 0.
        maximum: FP32 scalar tensor, upper end of the last bin.
        importance: (in,) float64 on the same device, or (1,) where all channels share it.
        bins: number of bins.
    """
    out = torch.zeros(_COPIES, bins, dtype=torch.float64, device=weight.device)
    count, channels = weight.numel(), importance.numel()
    kernel_size = weight[0, 0].numel() if weight.ndim > 2 else 1
    launch(
        _histogram, ((count + _BLOCK - 1) // _BLOCK,),
        weight, maximum, importance, out, count, channels, kernel_size, bins,
        BLOCK=_BLOCK, COPIES=_COPIES, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out.sum(0)


def search_amax(
    maximum: torch.Tensor, density: torch.Tensor, candidates: int, refinements: int, *, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Search the best amax of one histogram (see search.search_amax) in two launches a round.

    Args:
        maximum: FP32 scalar tensor.
        density: (bins,) float64.
        candidates, refinements, scaled: as in search.

    Returns:
        The amax (FP32 scalar tensor), its error and the power (float64 scalar tensors).
    """
    device = density.device
    # The last is the error of storing only zeros, which is the power of the weights.
    errors = torch.empty(candidates + 1, dtype=torch.float64, device=device)
    # low, high, best amax and lowest error so far
    state = torch.empty(4, dtype=torch.float64, device=device)
    for round_number in range(refinements + 1):
        launch(
            _candidate_errors, (candidates + 1,),
            maximum, density, state, errors, candidates, round_number,
            SCALED=scaled, BINS=density.numel(), BLOCK=1024, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        launch(
            _refine, (1,), maximum, state, errors, candidates, round_number,
            BLOCK=triton.next_power_of_2(candidates), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return state[2].to(torch.float32), state[3], errors[candidates]


def search_rows(
    weight: torch.Tensor, importance: torch.Tensor, parts: int, steps: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """Search where to clip each row of an INT8 weight (see int8.search_rows), in one launch.

    Args:
        weight: contiguous (out, in, ...) floating tensor on a GPU.
        importance: (in,) FP32 there, or (1,) where all channels share it.
        parts: of a row's largest weight, of which whole numbers are tried.
        steps: by which the search goes on, the coarsest first.

    Returns:
        What RowSearch has, in that order.
    """
    rows, device = len(weight), weight.device
    size, channels = weight[0].numel(), importance.numel()
    places = size // weight.shape[1]
    shares = torch.empty(rows, dtype=torch.uint8, device=device)
    numbers = torch.empty(3, rows, dtype=torch.float32, device=device)
    odd = torch.zeros((), dtype=torch.int32, device=device)
    launch(
        _search_rows, (rows,),
        weight, importance, shares, numbers, odd, rows, size, channels, places,
        PARTS=parts, STEPS=len(steps), FIRST=steps[0],
        BLOCK=_ROW_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return shares, *numbers, odd == 0


if triton is not None:

    @triton.jit
    def _finite_magnitude(weight, at, inside):
        magnitude = tl.abs(tl.load(weight + at, mask=inside, other=0.0).to(tl.float32))
        finite = magnitude < float("inf")  # nan is not
        return tl.where(finite, magnitude, 0.0), finite

    @triton.jit
    def _largest_magnitude(weight, found, count, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        magnitude, finite = _finite_magnitude(weight, at, at < count)
        # As integers, the bits of floats that are not negative have the same order as the floats.
        tl.atomic_max(found, tl.max(magnitude.to(tl.int32, bitcast=True)), sem="relaxed")
        tl.atomic_max(found + 1, tl.max(tl.where(finite, 0, 1)), sem="relaxed")

    # Triton compiles a variant for each kind of size. That gains nothing for these.
    @triton.jit(do_not_specialize=["channels"])
    def _histogram(
        weight, maximum, importance, out, count, channels, kernel_size, bins,
        BLOCK: tl.constexpr, COPIES: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        magnitude, _ = _finite_magnitude(weight, at, inside)
        width = tl.div_rn(tl.load(maximum), bins.to(tl.float32))
        index = tl.minimum(tl.div_rn(magnitude, width).to(tl.int32), bins - 1)
        channel = (at // kernel_size) % channels
        share = tl.load(importance + channel, mask=inside, other=0.0)
        copy = out + (tl.program_id(0) % COPIES) * bins
        tl.atomic_add(copy + index, share, mask=inside, sem="relaxed")

    @triton.jit
    def _round_to_grid(magnitude):
        bits = ((magnitude.to(tl.int32, bitcast=True) + 0x7FFFF) >> 20) << 20
        subnormal = tl.ceil(magnitude * 512.0 - 0.5) / 512.0
        return tl.where(magnitude < 0.015625, subnormal, bits.to(tl.float32, bitcast=True))

    @triton.jit
    def _range(maximum, state, round_number):
        """Where candidates are tried; in round 0 the state has no numbers yet."""
        top = tl.load(maximum).to(tl.float64)
        low = tl.where(round_number == 0, top * 0.5, tl.load(state))
        high = tl.where(round_number == 0, top, tl.load(state + 1))
        return low, high

    @triton.jit
    def _candidate(low, high, index, count):
        """Candidate `index` of `count`, evenly in FP32 as torch.linspace has it."""
        start = low.to(tl.float32)
        end = high.to(tl.float32)
        step = tl.div_rn(end - start, (count - 1).to(tl.float32))
        up = tl.fma(step, index.to(tl.float32), start)
        down = tl.fma(-step, (count - 1 - index).to(tl.float32), end)
        return tl.where(index < count // 2, up, down)

    @triton.jit(do_not_specialize=["round_number"])
    def _candidate_errors(
        maximum, density, state, errors, count, round_number,
        SCALED: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        low, high = _range(maximum, state, round_number)
        amax = _candidate(low, high, tl.program_id(0), count)
        factor = tl.div_rn(448.0, amax)
        width = tl.load(maximum).to(tl.float64) / BINS
        total = tl.zeros((BLOCK,), dtype=tl.float64)
        for start in range(0, BINS, BLOCK):
            at = start + tl.arange(0, BLOCK)
            centre = (at.to(tl.float64) + 0.5) * width
            value = centre.to(tl.float32)
            if SCALED:
                rounded = tl.div_rn(_round_to_grid(tl.minimum(value * factor, 448.0)), factor)
            else:
                rounded = _round_to_grid(tl.minimum(value, tl.minimum(amax, 448.0)))
            share = tl.load(density + at, mask=at < BINS, other=0.0)
            rounded = tl.where(tl.program_id(0) < count, rounded, 0.0)
            difference = rounded.to(tl.float64) - centre
            total += difference * difference * share
        tl.store(errors + tl.program_id(0), tl.sum(total))

    @triton.jit(do_not_specialize=["round_number"])
    def _refine(maximum, state, errors, count, round_number, BLOCK: tl.constexpr):  # noqa: N803
        low, high = _range(maximum, state, round_number)
        top = tl.load(maximum).to(tl.float64)
        at = tl.arange(0, BLOCK)
        found = tl.load(errors + at, mask=at < count, other=float("inf"))
        error, index = tl.min(found, 0, return_indices=True)  # the first of equals
        best = _candidate(low, high, index, count).to(tl.float64)
        before = tl.load(state + 3)
        first = round_number == 0
        best = tl.where(first | (error < before), best, tl.load(state + 2))
        error = tl.where(first, error, tl.minimum(error, before))
        reach = (high - low) / 4
        tl.store(state, tl.maximum(top * 0.1, best - reach))
        tl.store(state + 1, tl.minimum(top * 1.2, best + reach))
        tl.store(state + 2, best)
        tl.store(state + 3, error)

    @triton.jit
    def _row_errors(
        weight, importance, size, channels, places, amax, BLOCK: tl.constexpr  # noqa: N803
    ):  # fmt: skip
        """The weighted squared error of a row that is clipped at amax; at 0 its power."""
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        factor = tl.div_rn(127.0, tl.maximum(amax, 1e-30))
        scale = tl.div_rn(amax, 127.0)
        start = size * 0
        while start < size:
            at = start + tl.arange(0, BLOCK)
            start += BLOCK
            magnitude, _ = _finite_magnitude(weight, at, at < size)
            share = tl.load(importance + (at // places) % channels, mask=at < size, other=0.0)
            # From 2^23 on, FP32 has whole numbers only.
            rounded = (tl.minimum(magnitude * factor, 127.0) + 8388608.0) - 8388608.0
            difference = rounded * scale - magnitude
            total += difference * difference * share
        return tl.sum(total)

    # Triton would make a size of 1 a constant, which cannot count up.
    @triton.jit(do_not_specialize=["rows", "size", "channels", "places"])
    def _search_rows(
        weight, importance, shares, numbers, odd, rows, size, channels, places,
        PARTS: tl.constexpr, STEPS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        weight += row * size
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        wrong = tl.zeros((BLOCK,), dtype=tl.int32)
        start = size * 0
        while start < size:
            at = start + tl.arange(0, BLOCK)
            start += BLOCK
            magnitude, finite = _finite_magnitude(weight, at, at < size)
            largest = tl.maximum(largest, magnitude)
            wrong = tl.maximum(wrong, tl.where(finite, 0, 1))
        top = tl.max(largest)
        tl.atomic_max(odd, tl.max(wrong), sem="relaxed")
        part = tl.where(top > 1e-30, top, 1e-7) / PARTS
        most = part * 0 + PARTS
        best = most
        error = _row_errors(weight, importance, size, channels, places, part * best, BLOCK)
        tried = best
        for _ in range(PARTS // FIRST - 1):
            tried -= FIRST
            found = _row_errors(weight, importance, size, channels, places, part * tried, BLOCK)
            best = tl.where(found < error, tried, best)
            error = tl.minimum(found, error)
        step = best * 0 + FIRST
        for _ in range(STEPS - 1):
            step *= 0.5
            above = tl.minimum(best + step, most)
            below = best - step
            found = _row_errors(weight, importance, size, channels, places, part * above, BLOCK)
            best = tl.where(found < error, above, best)
            error = tl.minimum(found, error)
            found = _row_errors(weight, importance, size, channels, places, part * below, BLOCK)
            best = tl.where(found < error, below, best)
            error = tl.minimum(found, error)
        power = _row_errors(weight, importance, size, channels, places, part * 0, BLOCK)
        tl.store(shares + row, best.to(tl.int32).to(tl.uint8))
        tl.store(numbers + row, top)
        tl.store(numbers + rows + row, error)
        tl.store(numbers + 2 * rows + row, power)
