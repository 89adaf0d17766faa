"""Compiling kernels in the background while a model is loaded.

Triton compiles each of our kernels when it is used for the first time on a machine. All together
take seconds, most of which Triton spends in programs and libraries that let Python run.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch

from ...quant import NumberFormat, SearchSettings
from ...quant.ahead import compilations

_THREADS = 4


class Ahead:
    """Runs functions in a few threads. They end when all is done, and when Python ends."""

    def __init__(
        self, jobs: Iterable[Callable[[], object]], entered: Callable[[], AbstractContextManager]
    ) -> None:
        """Start. The first function runs alone, because it sets up what the others need too.

        Args:
            jobs: the functions, the most urgent first.
            entered: returns a context that each thread works in.
        """
        self._jobs, self._entered = deque(jobs), entered
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, name="hswq compile")
        if self._jobs:
            self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is left to do."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        self._work(most=1)
        others = []
        for _ in range(min(_THREADS, os.cpu_count() or 1, len(self._jobs)) - 1):
            others.append(threading.Thread(target=self._work, name="hswq compile"))
            others[-1].start()
        self._work()
        for one in others:
            one.join()
        if self._errors:  # the load tries again, and does without Triton if that fails too
            reason = str(self._errors[0]).split("\n", 1)[0]
            logging.info("HSWQ: not all kernels were compiled ahead (%s)", reason)

    def _work(self, most: int | None = None) -> None:
        try:
            with self._entered():
                for job in itertools.islice(self._left(), most):
                    job()
        except Exception as error:  # Triton raises many kinds
            self._jobs.clear()
            self._errors.append(error)

    def _left(self) -> Iterator[Callable[[], object]]:
        while threading.main_thread().is_alive():
            try:
                yield self._jobs.popleft()
            except IndexError:
                return


@functools.cache
def compile_ahead(
    device: torch.device,
    number_format: NumberFormat,
    dtype: torch.dtype,
    searched: SearchSettings | None,
    sketch_rows: int,
) -> Ahead:
    """Start compiling what a load and its first step need; once for each kind of load.

    On devices other than NVIDIA's GPUs, and without Triton, there is nothing to compile.

    Args:
        device: that quantizes and computes.
        number_format, dtype, searched, sketch_rows: see quant.ahead.compilations.
    """
    jobs = []
    if device.type == "cuda" and torch.version.hip is None:
        jobs = compilations(number_format, dtype, searched=searched, sketch_rows=sketch_rows)
    return Ahead(jobs, lambda: torch.cuda.device(device))
