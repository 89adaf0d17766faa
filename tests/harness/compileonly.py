"""Triton's compiler for cards that this machine does not have: nothing is launched."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

STATIC_SHARED = 48 << 10
"""Bytes of shared memory that a kernel may have on every NVIDIA card."""


class _Card:
    """A Triton driver that has a compiler's target and no card."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"sm_{self._target.arch}"  # kernels are kept for each device

    def get_current_stream(self, _: str) -> int:
        return 0

    def get_device_properties(self, _: str) -> dict[str, int]:
        return {"max_shared_mem": STATIC_SHARED}

    def load_binary(self, *_) -> tuple[object, int, int, int, int]:
        return self, 0, 0, 0, 1024

    def launcher_cls(self, *_) -> object:
        return lambda *_: None


@contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Let kernels be compiled for a card, such as 75 for sm_75, when they are called."""
    before = driver._active
    driver.set_active(_Card(capability))
    try:
        yield
    finally:
        driver.set_active(before)


def compiled(capability: int, *modules: ModuleType) -> list[CompiledKernel]:
    """Return what was compiled of the modules' kernels for a card, in `compiling_for`."""
    kernels = [one for module in modules for one in vars(module).values()]
    kernels = {id(one): one for one in kernels if isinstance(one, triton.JITFunction)}
    caches = [one.device_caches.get(f"sm_{capability}", ({},)) for one in kernels.values()]
    return [one for cache, *_ in caches for one in cache.values()]


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Return what a kernel takes on its card: REG, STACK, SHARED, LOCAL, as NVIDIA's tool says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
