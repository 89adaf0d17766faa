"""Launching Triton kernels, and compiling them before they are needed."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
    from triton.runtime import driver
except ImportError:  # torch for Windows and macOS comes without Triton
    triton = tl = driver = None


def launch(kernel: object, programs: tuple[int, ...], *arguments: object, **how: object) -> object:
    """Launch a kernel on the device of its first argument, and return the compiled kernel.

    Triton compiles a kernel once for each kind of arguments: their dtypes, and whether sizes are 1
    or multiples of 16. If the first argument is a tensor of torch's meta device, which has no
    memory, the kernel is only compiled, for torch's current GPU. Later launches find it.

    Args:
        kernel: a function with `triton.jit`.
        programs: number of programs, in up to three dimensions.
        arguments: of the kernel.
        how: its constants and compiler options.
    """
    if arguments[0].is_meta:
        return _compile(kernel, arguments, how)
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device
        return kernel[programs](*arguments, **how)


def _compile(kernel: object, arguments: tuple[object, ...], how: dict[str, object]) -> object:
    compiled = kernel.warmup(*arguments, grid=(1,), **how)
    # Triton writes a C function for the launch, and compiles that too. It is found on disk later.
    driver.active.launcher_cls(compiled.src, compiled.metadata)
    return compiled
