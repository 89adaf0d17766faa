"""The Triton kernels against torch; without an NVIDIA GPU, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, generator
from hswq.calibration import kernels, sketch_kernels, sums
from hswq.calibration.sketch import SIZE
from hswq.calibration.sketch_sums import PICKED, add_rows_with_torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

runs_here = pytest.mark.skipif(
    kernels.triton is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs an NVIDIA GPU; without one it runs in test_in_the_interpreter",
)

LAYOUTS = {
    "image": lambda: values(2, 6, 9, 7),
    "large image": lambda: values(2, 3, 72, 64),
    "one pixel": lambda: values(3, 20, 1, 1),
    "channels last": lambda: values(2, 6, 8, 10).to(memory_format=torch.channels_last),
    "many channels last": lambda: values(1, 320, 12, 12).to(memory_format=torch.channels_last),
    "tokens": lambda: values(2, 77, 64),
    "tokens of many channels": lambda: values(2, 5, 1300),
    "many tokens": lambda: values(1, 700, 24),
    "tokens of an image": lambda: values(2, 6, 8, 10).flatten(2).transpose(1, 2),
    "embedding": lambda: values(2, 1280),
    "one row": lambda: values(1, 7),
    "one value": lambda: values(1, 1),
    "one channel": lambda: values(5, 1, 8, 8),
}

MORE = {
    "large image": lambda: torch.randn(2, 33, 40, 24, generator=generator(0)),
    "part of a text": lambda: torch.randn(2, 90, 48, generator=generator(0))[:, :77, 8:],
    "part of a batch": lambda: torch.randn(9, 48, generator=generator(0))[::2],
    "columns": lambda: torch.randn(4, 6, generator=generator(0)).T,
    "an expanded text": lambda: torch.randn(1, 77, 16, generator=generator(0)).expand(3, -1, -1),
}

# The interpreter multiplies the bits of BF16 as if they were whole numbers.
MULTIPLIED = [one for one in DTYPES if not (INTERPRETED and one is torch.bfloat16)]


def values(*shape: int) -> torch.Tensor:
    """Values with heavy tails, and a mean of its own in every place of the last axis."""
    numbers = generator(sum(shape))
    heavy = torch.randn(shape, generator=numbers) / torch.rand(shape, generator=numbers).sqrt()
    return heavy + torch.randn(shape[-1], generator=numbers)


def added(output: torch.Tensor, inputs: torch.Tensor, calls: int = 1, offset: int = 0):
    """The sums and the maximum that the kernel leaves; around them nothing may change."""
    lies = kernels.matrix_of(inputs)
    assert lies is not None
    assert kernels.is_flat(output)
    begin, middle = offset + 3, offset + 3 + kernels.MOMENTS * kernels.SLOTS
    end = middle + lies.channels
    found = torch.zeros(end + 5, dtype=torch.float64, device=inputs.device)
    moments, importance = found[begin:middle].view(-1, kernels.MOMENTS), found[middle:end]
    for _ in range(calls):
        kernels.add_call(moments, importance, output, inputs, lies)
    assert not found[:begin].any()
    assert not found[end:].any()
    return moments[:, :2].sum(0), importance, moments[:, 2].amax()


def exact_importance(inputs: torch.Tensor) -> torch.Tensor:
    axes = {4: (0, 2, 3), 3: (0, 1), 2: (0,)}[inputs.ndim]
    return inputs.double().abs().mean(axes)


def assert_exact(output: torch.Tensor, inputs: torch.Tensor, calls: int = 1, **where) -> None:
    moments, importance, amax = added(output, inputs, calls, **where)
    assert amax.item() == inputs.double().abs().max().item()
    wide = output.double()
    size = wide.square().mean().sqrt().item()
    assert moments[0].item() == pytest.approx(calls * wide.mean().item(), abs=1e-6 * calls * size)
    assert moments[1].item() == pytest.approx(calls * wide.square().mean().item(), rel=1e-6)
    torch.testing.assert_close(importance, calls * exact_importance(inputs), rtol=1e-6, atol=0)


@runs_here
class TestAddCall:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_float64(self, layout, dtype):
        inputs = LAYOUTS[layout]().to(DEVICE, dtype)
        assert_exact((values(3, 5, 11) * 30).to(DEVICE, dtype), inputs)

    @pytest.mark.parametrize("shape", [(1, 1), (2, 1280), (2, 4, 100, 90), (3, 333, 64)])
    def test_outputs_of_any_size(self, shape):
        assert_exact(values(*shape).to(DEVICE, torch.float16), values(2, 4).to(DEVICE))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_with_the_steps_of_large_tensors(self, layout, monkeypatch):
        monkeypatch.setattr(kernels, "_LARGE", 1)
        inputs = LAYOUTS[layout]().to(DEVICE, torch.float16)
        assert_exact(values(3, 70, 110).to(DEVICE, torch.float16), inputs)

    def test_an_output_in_channels_last(self):
        output = values(2, 6, 9, 7).to(DEVICE, memory_format=torch.channels_last)
        assert_exact(output, values(2, 4).to(DEVICE))

    def test_adds_to_what_is_there(self):
        assert_exact(values(3, 5).to(DEVICE), values(2, 4, 9, 9).to(DEVICE), calls=3, offset=7)

    def test_squares_beyond_fp16(self):
        output = torch.full((40, 1000), 60000.0, dtype=torch.float16, device=DEVICE)
        assert_exact(output, output)

    def test_what_is_not_finite_stays_so(self):
        output = values(4, 6).to(DEVICE)
        output[1, 2] = torch.inf
        moments, importance, amax = added(output, output)
        assert moments.isfinite().tolist() == [False, False]
        assert importance.isfinite().tolist() == [True, True, False, True, True, True]
        assert amax.item() == torch.inf

    @pytest.mark.parametrize("shape", [(4, 6), (2, 6, 4, 4)])
    @pytest.mark.parametrize("nan", [torch.nan, -torch.nan])
    def test_nan_is_above_all(self, shape, nan):
        inputs = values(*shape).to(DEVICE)
        inputs.view(-1)[3], inputs.view(-1)[9] = nan, torch.inf
        assert added(inputs, inputs, calls=2)[2].isnan()

    def test_equals_torchs_path(self):
        inputs, output = values(2, 6, 9, 7).to(DEVICE), values(2, 8, 9, 7).to(DEVICE)
        moments, importance, amax = added(output, inputs)
        means, largest = sums.input_magnitudes(inputs)
        torch.testing.assert_close(moments, sums.output_moments(output).double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(importance, means.double(), rtol=1e-6, atol=0)
        assert amax == largest


class TestMatrixOf:
    @pytest.mark.parametrize(
        "inputs",
        [
            torch.zeros(4),
            torch.zeros(2, 3, 4, 5, 6),
            torch.zeros(0, 4),
            torch.zeros(4, 4, dtype=torch.float64),
            torch.zeros(2, 4, 6, 8)[:, :, ::2],
            torch.zeros(2, 4, 6, 8).transpose(2, 3),
            torch.zeros(2, 1, 6, 8).expand(-1, 4, -1, -1),
            torch.zeros(4, 8)[:, ::2],
            torch.zeros(2, 4, 8)[:, :, ::2],
        ],
        ids=["1-D", "5-D", "empty", "float64", "strided", "transposed", "expanded", "columns",
             "tokens"],
    )  # fmt: skip
    def test_leaves_other_layouts_to_torch(self, inputs):
        assert kernels.matrix_of(inputs) is None

    def test_the_cpu_is_torchs(self):
        assert not kernels.usable(torch.device("cpu"))
        assert not sketch_kernels.usable(torch.device("cpu"))


@runs_here
class TestAddRows:
    @pytest.mark.parametrize("layout", [*LAYOUTS, *MORE])
    @pytest.mark.parametrize("dtype", MULTIPLIED)
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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the others run on the NVIDIA GPU")
def test_in_the_interpreter():
    """All of this file but itself."""
    pytest.importorskip("triton", reason="Triton is not in torch's Windows and macOS builds")
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__,
         "-k", "not test_in_the_interpreter"],
        cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert " passed" in found.stdout
    assert " skipped" not in found.stdout
