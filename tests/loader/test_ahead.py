"""Kernels are compiled in the background: no thread is left, and an error stops nothing."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hswq.loader.engine.ahead import Ahead, compile_ahead
from hswq.quant import DEFAULT_SETTINGS, FP8_SCALED


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "hswq compile"]


def ahead(*jobs) -> Ahead:
    return Ahead(jobs, contextlib.nullcontext)


def test_the_first_runs_alone_and_the_others_together():
    done, together = [], threading.Barrier(2, timeout=60)
    begun = ahead(
        lambda: done.append(len(threads())),
        *[lambda: done.append(together.wait())] * 2,
        lambda: done.append("last"),
    )
    begun.wait()
    assert done[0] == 1
    assert sorted(map(str, done[1:])) == ["0", "1", "last"]
    assert not threads()
    begun.wait()  # has nothing to wait for


def test_an_error_is_logged_once_and_stops_what_is_left(caplog):
    def fails():
        raise RuntimeError("no compiler\nand more")

    done = []
    with caplog.at_level(logging.INFO):
        ahead(fails, *[lambda: done.append(1)] * 3).wait()
    said = [one.message for one in caplog.records if "compiled ahead" in one.message]
    assert said == ["HSWQ: not all kernels were compiled ahead (no compiler)"]
    assert not done


def test_other_devices_have_nothing_to_compile(caplog):
    with caplog.at_level(logging.INFO):
        compile_ahead(torch.device("cpu"), FP8_SCALED, torch.float16, DEFAULT_SETTINGS, 128).wait()
    assert not caplog.records


@pytest.mark.gpu
def test_a_gpu_finds_what_was_compiled():
    if not torch.cuda.is_available():
        pytest.skip("this machine has no NVIDIA GPU")
    from hswq.quant import kernels, search_kernels

    device = torch.device("cuda", torch.cuda.current_device())
    compile_ahead.cache_clear()
    compile_ahead(device, FP8_SCALED, torch.float16, DEFAULT_SETTINGS, 128).wait()
    kinds = [kernels._dequantize, search_kernels._histogram, search_kernels._refine]
    before = [len(one.device_caches[device.index][0]) for one in kinds]
    assert all(before)
    weight = torch.ones(64, 64, dtype=torch.float16, device=device)
    FP8_SCALED.search(weight, torch.ones(64, dtype=torch.float64), DEFAULT_SETTINGS)
    assert [len(one.device_caches[device.index][0]) for one in kinds] == before


def test_python_ends_while_much_is_left():
    program = """
import contextlib, time
import conftest
from hswq.loader.engine.ahead import Ahead
Ahead([lambda: (print("one", flush=True), time.sleep(0.2))] * 500, contextlib.nullcontext)
"""
    tests = str(Path(__file__).resolve().parent.parent)
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tests, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    assert not found.stderr
    assert found.stdout.count("one") < 100
