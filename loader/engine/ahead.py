"""Preparing a GPU for the first quantized load, long before a user asks for one.

Without kernels (see quant.ahead) that load takes several seconds longer than the next ones, and one
second when they are prepared (docs/cost.md). Beginning together with the load gained nothing: its
first layer waits for almost all kernels. Who quantizes a model has recorded it in 16 bit before, or
has uploaded statistics: both begin it (loader/recording/recorder.py, loader/panel/uploads.py).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch

from ...calibration.sketch import SIZE
from ...quant.ahead import rehearsals

_NICE = 5  # not more: it holds the interpreter's lock now and then, for which others wait
_begun: dict[tuple[torch.device, torch.dtype], Ahead] = {}


class Ahead:
    """Runs functions one after the other in a thread, which ends early when Python ends.

    Attributes:
        seconds: that each function took so far.
    """

    def __init__(self, jobs: Sequence[Callable[[], object]]) -> None:
        """Start."""
        self.seconds: list[float] = []
        self._jobs = jobs
        self._thread = threading.Thread(target=self._run, name="hswq ahead")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is left to do."""
        self._thread.join()

    def _run(self) -> None:
        try:
            _be_nice()
            with torch.inference_mode():  # as nodes run
                for job in self._jobs:
                    if not threading.main_thread().is_alive():
                        return
                    start = time.perf_counter()
                    job()
                    self.seconds.append(time.perf_counter() - start)
        except Exception as error:  # a load tries again, and does without Triton if that fails too
            logging.info("HSWQ: not all was prepared (%s)", str(error).split("\n", 1)[0])


def _be_nice() -> None:
    """Let others come first. On Linux this is for a thread and the compilers that it starts."""
    if sys.platform == "linux":
        own = os.PRIO_PROCESS, threading.get_native_id()
        os.setpriority(*own, os.getpriority(*own) + _NICE)


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Start preparing for the default number format; once for each GPU of NVIDIA and dtype.

    Args:
        device: that will quantize and compute. On others than NVIDIA's there is nothing to do.
        dtype: of the weights that will be quantized.
    """
    if device.type == "cuda" and torch.version.hip is None and (device, dtype) not in _begun:
        _begun[device, dtype] = Ahead(rehearsals(dtype, device, SIZE))


def wait() -> list[float]:
    """Wait for all that was begun, so that nothing is compiled twice; return each one's seconds."""
    begun = list(_begun.values())
    for one in begun:
        one.wait()
    return [seconds for one in begun for seconds in one.seconds]
