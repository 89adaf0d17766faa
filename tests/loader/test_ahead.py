"""A GPU is prepared by a recorded sampling: in one patient thread, and an error stops nothing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import comfy.model_management
import pytest
import torch
from harness.inprocess import sample
from hswq.loader.engine import ahead
from hswq.loader.engine.ahead import Ahead
from hswq.quant import DEFAULT_SETTINGS, FP8_SCALED


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What was to be prepared: nothing of it is."""
    asked: list[tuple] = []
    monkeypatch.setattr(ahead, "prepare", lambda *what: asked.append(what))
    return asked


class TestRecording:
    def test_a_recorded_sampling_prepares_the_models_device(self, model, recorder, asked):
        sample(model)
        assert asked == [(model.load_device, model.model.get_dtype())]

    def test_one_that_is_not_recorded_prepares_nothing(self, model, recorder, asked):
        recorder.remove()
        sample(model)
        assert not asked

    def test_one_that_is_interrupted_prepares_nothing(self, model, recorder, asked):
        interrupt = comfy.model_management.InterruptProcessingException

        def stop(*_):
            raise interrupt

        with pytest.raises(interrupt):
            sample(model, steps=2, callback=stop)
        assert not asked


class TestPrepare:
    def test_once_for_each_gpu_and_dtype(self, monkeypatch):
        begun = []
        monkeypatch.setattr(ahead, "_begun", {})
        monkeypatch.setattr(ahead, "rehearsals", lambda *what: [lambda: begun.append(what)])
        for index, dtype in (
            (0, torch.half),
            (0, torch.half),
            (0, torch.bfloat16),
            (1, torch.half),
        ):
            ahead.prepare(torch.device("cuda", index), dtype)
        assert len(ahead.wait()) == 3
        assert {(dtype, device.index) for dtype, device, _ in begun} == {
            (torch.half, 0), (torch.bfloat16, 0), (torch.half, 1)
        }  # fmt: skip

    def test_other_devices_need_nothing(self, monkeypatch):
        monkeypatch.setattr(ahead, "_begun", {})
        ahead.prepare(torch.device("cpu"), torch.half)
        assert not ahead.wait()

    @pytest.mark.gpu
    def test_a_gpu_finds_what_was_compiled(self, monkeypatch):
        if not torch.cuda.is_available():
            pytest.skip("this machine has no NVIDIA GPU")
        from hswq.quant import kernels, search_kernels

        device = torch.device("cuda", torch.cuda.current_device())
        monkeypatch.setattr(ahead, "_begun", {})
        ahead.prepare(device, torch.float16)
        assert len(ahead.wait()) == 5
        kinds = [kernels._dequantize, search_kernels._histogram, search_kernels._refine]
        before = [len(one.device_caches[device.index][0]) for one in kinds]
        assert all(before)
        weight = torch.ones(64, 64, dtype=torch.float16, device=device)
        FP8_SCALED.search(weight, torch.ones(64, dtype=torch.float64), DEFAULT_SETTINGS)
        assert [len(one.device_caches[device.index][0]) for one in kinds] == before


class TestThread:
    def test_lets_others_come_first(self):
        if sys.platform != "linux":
            pytest.skip("only Linux has priorities of threads")

        def priority() -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        found, own = [], priority()
        Ahead([lambda: found.append(priority())]).wait()
        assert found == [min(own + 5, 19)]
        assert priority() == own

    def test_an_error_is_logged_once_and_stops_what_is_left(self, caplog):
        def fails():
            raise RuntimeError("no compiler\nand more")

        done = []
        with caplog.at_level(logging.INFO):
            begun = Ahead([lambda: None, fails, lambda: done.append(1)])
            begun.wait()
        said = [one.message for one in caplog.records if "prepared" in one.message]
        assert said == ["HSWQ: not all was prepared (no compiler)"]
        assert not done
        assert len(begun.seconds) == 1

    def test_ends_when_python_ends(self):
        program = """
import time
import conftest
from hswq.loader.engine.ahead import Ahead
Ahead([lambda: (print("one", flush=True), time.sleep(0.2))] * 500)
"""
        tests = str(Path(__file__).resolve().parent.parent)
        found = subprocess.run(
            [sys.executable, "-c", program], cwd=tests, capture_output=True, text=True, timeout=60
        )
        assert found.returncode == 0, found.stderr
        assert not found.stderr
        assert found.stdout.count("one") < 100
