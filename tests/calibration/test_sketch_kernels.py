"""The sketches' kernel against torch; without an NVIDIA GPU, in Triton's interpreter."""

import pytest
import torch
from helpers import DTYPES, generator
from hswq.calibration import sketch_kernels
from hswq.calibration.sketch import SIZE
from hswq.calibration.sketch_sums import PICKED, add_rows_with_torch
from test_kernels import DEVICE, INTERPRETED, LAYOUTS, in_the_interpreter, runs_here

MORE = {
    "large image": lambda: torch.randn(2, 33, 40, 24, generator=generator(0)),
    "part of a text": lambda: torch.randn(2, 90, 48, generator=generator(0))[:, :77, 8:],
    "part of a batch": lambda: torch.randn(9, 48, generator=generator(0))[::2],
    "columns": lambda: torch.randn(4, 6, generator=generator(0)).T,
    "an expanded text": lambda: torch.randn(1, 77, 16, generator=generator(0)).expand(3, -1, -1),
}


@runs_here
class TestAddRows:
    @pytest.mark.parametrize("layout", [*LAYOUTS, *MORE])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("seed", [5, 0xFEDCBA98])
    def test_is_torchs(self, layout, dtype, seed):
        """The same rows and signs; TF32, on a GPU, has ten bits of a value."""
        inputs = {**LAYOUTS, **MORE}[layout]().to(DEVICE, dtype)
        channels = inputs.shape[1 if inputs.ndim == 4 else -1]
        positions = inputs.numel() // channels
        count = min(PICKED, positions)
        found = torch.ones(SIZE + 1, channels, device=DEVICE)
        expected = torch.ones(SIZE, channels, device=DEVICE)
        rows = sketch_kernels.rows_of(inputs)
        sketch_kernels.add_rows(found[:SIZE], inputs, rows, count, seed)
        add_rows_with_torch(expected, inputs, positions, count, seed)
        rtol = 2**-10 if dtype == torch.float32 else 2**-20
        bound = rtol * count * inputs.abs().max().item()
        torch.testing.assert_close(found[:SIZE], expected, rtol=0, atol=bound)
        assert (found[SIZE] == 1).all(), "it wrote beyond the sketch"

    def test_rounds_to_bf16(self):
        inputs = LAYOUTS["tokens"]().to(DEVICE)
        exact = torch.zeros(SIZE, 64, device=DEVICE)
        rounded = exact.to(torch.bfloat16)
        for matrix in (exact, rounded):
            rows = sketch_kernels.rows_of(inputs)
            sketch_kernels.add_rows(matrix, inputs, rows, PICKED, 3)
        bits = 7 if INTERPRETED else 8  # the interpreter truncates
        torch.testing.assert_close(rounded.float(), exact, rtol=2**-bits, atol=0)


class TestRowsOf:
    @pytest.mark.parametrize(
        "inputs",
        [
            torch.zeros(4),
            torch.zeros(2, 3, 4, 5, 6),
            torch.zeros(0, 4),
            torch.zeros(4, 4, dtype=torch.float64),
            torch.zeros(2, 4, 6, 8)[:, :, :, ::2][:, :, ::2],
            torch.zeros(2, 4, 6, 8)[..., 2:],
        ],
        ids=["1-D", "5-D", "empty", "float64", "strided", "cut"],
    )
    def test_leaves_other_layouts_to_torch(self, inputs):
        assert sketch_kernels.rows_of(inputs) is None

    def test_the_cpu_is_torchs(self):
        assert not sketch_kernels.usable(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the others run on the NVIDIA GPU")
def test_in_the_interpreter():
    """All of this file but itself."""
    in_the_interpreter(__file__)
