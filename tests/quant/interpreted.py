"""Runs every Triton kernel on the CPU, in Triton's interpreter, against plain torch.

A script and not a test: the interpreter has to be chosen before Triton is imported. The GPU's own
runs are the CUDA half of the other tests here.
"""

import conftest  # noqa: F401 - the package `hswq`
import torch
from helpers import gaussian
from hswq.quant import (
    FP8_MAX,
    SearchSettings,
    compensate,
    compensate_kernels,
    feedback,
    fp8,
    int8,
    kernels,
    search_amax,
    search_kernels,
    weighted_histogram,
)
from hswq.quant.storing import Storing

SETTINGS = SearchSettings(256, 30, 2)
MANY = 64
"""Rows of a weight in a program that rounds: the interpreter takes one program after the other."""


def histogram_agrees(weight: torch.Tensor, importance: torch.Tensor | None) -> None:
    expected = weighted_histogram(weight, importance, SETTINGS.bins)
    largest, finite = search_kernels.largest_magnitude(weight)
    assert (largest, finite) == (expected.maximum, expected.finite)
    shares = torch.ones(1, dtype=torch.float64) if importance is None else importance
    sums = search_kernels.add_to_histogram(weight, largest, shares, SETTINGS.bins)
    torch.testing.assert_close(sums / sums.sum(), expected.density, rtol=1e-12, atol=0)


def search_agrees(weight: torch.Tensor, scaled: bool) -> None:
    histogram = weighted_histogram(weight, None, SETTINGS.bins)
    found = search_kernels.search_amax(
        histogram.maximum,
        histogram.density,
        SETTINGS.candidates,
        SETTINGS.refinements,
        scaled=scaled,
    )
    expected = search_amax(histogram, SETTINGS, scaled=scaled)
    assert found[0] == expected.amax
    torch.testing.assert_close(found[1:], tuple(expected[1:]), rtol=1e-12, atol=0)


def dequantize_agrees() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scale in (1.0, 0.0123, 3.0 / FP8_MAX):
        for dtype in (torch.float16, torch.float32):  # the interpreter truncates to BF16
            found = kernels.dequantize(every_byte, torch.tensor(scale), dtype)
            expected = fp8.dequantize(every_byte, torch.tensor(scale), dtype)
            assert torch.equal(found.nan_to_num(9e9), expected.nan_to_num(9e9)), (scale, dtype)


def dequantize_rows_agrees() -> None:
    for shape in ((6, 48), (5, 33), (4, 16, 3, 3), (300, 16)):
        numbers = torch.randint(-127, 128, shape).to(torch.int8)
        scale = gaussian(shape[0], 1).abs()
        for dtype in (torch.float16, torch.float32):
            found = kernels.dequantize_rows(numbers, scale, dtype)
            assert torch.equal(found, int8.dequantize(numbers, scale, dtype)), (shape, dtype)


def search_of_rows_agrees(weight: torch.Tensor, importance: torch.Tensor) -> None:
    """But where two shares are as good as each other: sums add up in another order."""
    found = int8.RowSearch(*search_kernels.search_rows(weight, importance, int8.SHARES, int8.STEPS))
    expected = int8.search_rows(weight, importance.expand(weight.shape[1]))
    assert torch.equal(found.largest, expected.largest)
    assert torch.equal(found.finite, expected.finite)
    assert (found.shares == expected.shares).float().mean() > 0.9
    for one, other in zip(found[2:4], expected[2:4], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def quantize_input_agrees() -> None:
    """On values of the grid and beyond its end: the interpreter truncates where a GPU rounds."""
    finite = [byte for byte in range(256) if byte & 0x7F != 0x7F]
    grid = torch.tensor(finite, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    beyond = torch.tensor([449.0, -1000.0, torch.inf, -torch.inf])
    for scale in (1.0, 0.25, 32.0):
        for dtype in (torch.float16, torch.float32):
            values = (torch.cat((grid, beyond)) * scale).to(dtype).repeat(40)
            found = kernels.quantize_input(values, torch.tensor(scale))
            expected = fp8.quantize_input(values, torch.tensor(scale))
            assert torch.equal(found.float(), expected.float()), (scale, dtype)


def gated_input_agrees() -> None:
    """On products of the grid: a gate far from 0 passes all, or nothing."""
    finite = [byte for byte in range(256) if byte & 0x7F != 0x7F]
    grid = torch.tensor(finite, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / 16
    for gate in (16.0, -16.0):
        for rows in (1, 3):
            values = torch.cat((grid, torch.full_like(grid, gate)))[None].half().repeat(rows, 1)
            found, expected = (
                module.gated_input(values, torch.tensor(1.0)).float() for module in (kernels, fp8)
            )
            assert torch.equal(found, expected), (gate, rows)
            assert found.any() == (gate > 0)
    for values in (gaussian(3, 48), gaussian(5, 1040).half()):
        found, expected = (module.gated_input(values, None) for module in (kernels, fp8))
        torch.testing.assert_close(found, expected)


def compensated_rounding_agrees(shapes: tuple[tuple[int, int, int], ...]) -> None:
    """Byte for byte but where a value lies next to a middle: sums add up in another order."""
    for rows, channels, size in shapes:
        found = feedback.feedback_of(gaussian(size, channels) @ gaussian(channels, channels))
        for dtype in (torch.float16, torch.float32):
            weight = gaussian(channels, rows).to(dtype)
            ways = [
                fp8.storing_of(weight, amax, scaled=scaled)
                for amax, scaled in ((0.05, True), (0.03, True), (0.03, False), (1e9, False))
            ]
            whole = fp8.quotient(1.0, torch.tensor(0.0004))
            ways.append(Storing(whole, 127.0, 1 / whole, torch.float32, torch.int8))
            for storing in ways:
                bases = storing.scaled(weight).to(torch.float32)
                values, error = bases + gaussian(*bases.shape), gaussian(rows, size)
                one, other = (
                    module.round_columns(
                        bases, values, error.clone(), found.answers, found.directions, storing
                    )
                    for module in (compensate, compensate_kernels)
                )
                different = one.view(torch.uint8) != other.view(torch.uint8)
                assert different.float().mean() < 0.005, (rows, channels, size, storing)


def rounding_in_the_kernel_is_a_cast() -> None:
    """Every value and every middle between two, with no column before that would move them."""
    finite = [byte for byte in range(256) if byte & 0x7F != 0x7F]
    grid = torch.tensor(finite, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid.sort().values
    values = torch.cat((grid, -grid, (grid[1:] + grid[:-1]) / 2, 2 * grid, grid / 64))[None]
    # Adding nothing makes 0 of -0.
    values = torch.cat((values, values.nextafter(torch.tensor(torch.inf)))) + 0.0
    idle, none = torch.zeros(2, 16), torch.zeros(values.shape[1], 16)
    for dtype in (torch.float16, torch.float32):
        storing = fp8.storing_of(values.to(dtype), FP8_MAX, scaled=True)
        found = compensate_kernels.round_columns(values, values, none, idle, idle, storing)
        expected = fp8.quantize(values.to(dtype), FP8_MAX, scaled=True)[0]
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), dtype


def rounding_to_int8_in_the_kernel_is_a_cast() -> None:
    """Every number, every middle between two, and what is clipped."""
    numbers = torch.arange(-130, 131) / 1.0
    values = torch.cat((numbers, numbers + 0.5, numbers + 0.25, numbers * 100))[None]
    idle, none = torch.zeros(1, 16), torch.zeros(values.shape[1], 16)
    storing = Storing(None, 127.0, torch.ones(()), torch.float32, torch.int8)
    found = compensate_kernels.round_columns(values, values, none, idle, idle, storing)
    assert torch.equal(found, storing.castable(values).to(torch.int8))


def main() -> None:
    channels = torch.linspace(0, 2, 24, dtype=torch.float64)
    for weight in (gaussian(16, 24), gaussian(16, 24, 3, 3), gaussian(5000, 2).to(torch.bfloat16)):
        histogram_agrees(weight, channels[: weight.shape[1]])
        histogram_agrees(weight, None)
        for scaled in (True, False):
            search_agrees(weight, scaled)
        for importance in (channels[: weight.shape[1]].float(), torch.ones(1)):
            search_of_rows_agrees(weight[:6], importance)
    odd = gaussian(16, 24)
    odd[0, :2] = torch.tensor([torch.inf, torch.nan])
    histogram_agrees(odd, channels)
    search_of_rows_agrees(odd[:4], channels.float())
    dequantize_agrees()
    dequantize_rows_agrees()
    quantize_input_agrees()
    gated_input_agrees()
    compensated_rounding_agrees(((3, 5, 20),))
    compensate_kernels._ROWS = MANY
    rounding_in_the_kernel_is_a_cast()
    rounding_to_int8_in_the_kernel_is_a_cast()
    compensated_rounding_agrees(((40, 14, 20), (3, 35, 112), (17, 1, 1), (70, 8, 40)))


main()
