"""Launching Triton kernels."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for Windows and macOS comes without Triton
    triton = tl = None


def launch(kernel: object, programs: tuple[int, ...], *arguments: object, **how: object) -> object:
    """Launch a kernel on the device of its first argument, and return the compiled kernel.

    Triton compiles a kernel once for each kind of arguments: their dtypes, and whether sizes are 1
    or multiples of 16.

    Args:
        kernel: a function with `triton.jit`.
        programs: number of programs, in up to three dimensions.
        arguments: of the kernel.
        how: its constants and compiler options.
    """
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
        return kernel[programs](*arguments, **how)
