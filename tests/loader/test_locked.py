"""A process that keeps a lock delays no sampling, and nothing that was recorded is lost."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from harness.inprocess import sample
from harness.recording import recorded
from harness.sums import FINGERPRINT, delta, samples_of
from hswq.calibration import Statistics, load_statistics
from hswq.loader import store
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.store import soon, waiting

PROCESS = Path(__file__).with_name("recording_process.py")
OTHER = "cd" * 32


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Nothing in memory but the test's own."""
    monkeypatch.setattr(waiting, "_waiting", {})
    return waiting._waiting


def add(of: str = FINGERPRINT, session: str = "recorded"):
    return store.add_soon(store.NewSums(delta(), of, session, "toy.safetensors"))


def lock_of(of: str = FINGERPRINT, session: str = "recorded") -> filelock.FileLock:
    return filelock.FileLock(f"{store.statistics_path(of, session, 'toy.safetensors')}.lock")


class TestSums:
    @pytest.mark.parametrize("before", [0, 1])
    def test_wait_in_memory(self, folder, before):
        folder.mkdir()
        for _ in range(before):
            add()
        with lock_of():
            assert samples_of(add()) == before + 1
            assert samples_of(add()) == before + 2
            known = store.statistics_of(FINGERPRINT)
            assert (known.samples if known else 0) == before
        assert samples_of(add()) == before + 3
        assert samples_of(store.statistics_of(FINGERPRINT)) == before + 3

    def test_are_added_when_another_model_samples(self, folder, waits):
        folder.mkdir()
        with lock_of():
            expected = add()
            add(OTHER)
            assert samples_of(store.statistics_of(OTHER)) == 1
            assert waits
        add(OTHER)
        assert not waits
        added = store.statistics_of(FINGERPRINT)
        assert samples_of(added) == 1
        # By this its sketches know it, which were held before.
        assert added.meta[store.RECORDING] == expected.meta[store.RECORDING]

    def test_are_forgotten_with_their_model(self, folder, waits):
        folder.mkdir()
        with lock_of(), lock_of(session="b"), lock_of(OTHER):
            add(), add(session="b"), add(OTHER)
            store.remove_statistics(FINGERPRINT, "b")
            assert list(waits) == [(FINGERPRINT, "recorded"), (OTHER, "recorded")]
            store.remove_statistics(FINGERPRINT)
            assert list(waits) == [(OTHER, "recorded")]

    def test_that_do_not_fit_are_reported(self, folder, waits, caplog):
        folder.mkdir()
        with lock_of():
            add()
        path = store.statistics_path(FINGERPRINT, "recorded", "toy.safetensors")
        path.mkdir()
        add(OTHER)
        assert not waits
        assert f"1 images recorded of toy.safetensors are lost: {path.name} cannot" in caplog.text


class TestAtTheEnd:
    def end(self, folder: Path, what: str) -> subprocess.CompletedProcess:
        command = [sys.executable, PROCESS, "end", folder, what]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    def test_what_waits_is_added(self, folder):
        folder.mkdir()
        ended = self.end(folder, "free")
        assert ended.returncode == 0, ended.stderr
        (path,) = folder.glob("*.pt")
        assert samples_of(load_statistics(path)) == 1

    def test_what_is_locked_even_then_is_reported(self, folder):
        folder.mkdir()
        ended = self.end(folder, "locked")
        assert ended.returncode == 0, ended.stderr
        assert "1 images recorded of toy.safetensors are lost: another process" in ended.stderr
        assert not list(folder.glob("*.pt"))


@pytest.mark.timeout(120)
def test_a_sampling_is_not_delayed(recorder, model, checkpoint, folder):
    its = fingerprint(str(checkpoint))
    sample(model)
    (path,) = folder.glob("*.pt")
    first = recorded(checkpoint).samples
    began = time.monotonic()
    sample(model)
    alone = time.monotonic() - began
    milestone = folder / f"{its[:16]}.milestone.lock"
    began = time.monotonic()
    with filelock.FileLock(f"{path}.lock"), filelock.FileLock(milestone):
        sample(model)
    assert time.monotonic() - began < alone + 5  # the lock is waited for ten seconds elsewhere
    assert recorder.status()[0].samples == 3 * first
    assert recorder.status()[0].state == "recording"
    assert recorded(checkpoint).samples == 2 * first
    soon.add_waiting()
    assert recorded(checkpoint).samples == 3 * first


def test_a_milestone_that_is_locked_is_kept_later(folder):
    add()
    kept = folder / f"{FINGERPRINT[:16]}.milestone"
    one = delta()["layer0"]
    calls = functools.reduce(type(one).merge, [one] * store.target())
    many = Statistics(dict.fromkeys(delta(), calls), {"samples": store.target(), "layers": 3})
    with filelock.FileLock(f"{kept}.lock"):
        began = time.monotonic()
        total = store.add_soon(store.NewSums(many, FINGERPRINT, "recorded", "toy.safetensors"))
        assert time.monotonic() - began < 5
        assert store.is_complete(total)
        assert not kept.exists()
    store.quantizing_statistics(FINGERPRINT)
    assert kept.exists()
