"""A disk that fails, is full or read-only, no file descriptors, a clock that goes backwards."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comfy.samplers import CFGGuider
from harness import faults, inprocess
from harness import refined as refined_models
from harness.exports import record, target_of, use_folders, wanted
from harness.mutations import made_up
from harness.sums import FINGERPRINT, delta, samples_of
from hswq.calibration import StatisticsError, load_statistics, save_statistics
from hswq.loader import store
from hswq.loader.files import fingerprints, owners
from hswq.loader.files.errors import ModelFileError
from hswq.loader.files.whole_hash import background
from hswq.loader.host import settings
from hswq.loader.jobs.export import export
from hswq.loader.jobs.leftovers import sweep_folders
from hswq.loader.panel.catalogue import Catalogue
from hswq.loader.panel.uploads import take_in
from hswq.loader.recording.recorder import Recorder
from hswq.loader.store import heads, refined, search_cache
from hswq.quant import make_plan

DAY = 86400
KEY = f"{FINGERPRINT[:16]}.{'0' * 32}"
FAILS = (OSError, StatisticsError, ModelFileError)

pytestmark = [
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="filters of system calls are written for Linux on x86-64",
    ),
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="a forked process cannot go on with CUDA; runs where there is no NVIDIA GPU",
    ),
]


class Work:
    """Everything that reads or writes files, prepared so that each needs its files anew."""

    def __init__(self, checkpoint: Path, statistics, sent: Path) -> None:
        self.folder, self._path, self.sent = sent.parent, str(checkpoint), sent.read_bytes()
        record(self._path, statistics)
        self.settings = wanted()
        self.target = target_of(self.settings)
        export(self._path, self.target, self.settings)
        store.add_statistics(store.NewSums(delta(), FINGERPRINT, "recorded", "toy.safetensors"))
        self._model = inprocess.load_16_bit(checkpoint)
        inprocess.sample(self._model)
        self._layers = dict(list(refined_models.fp8_layers(checkpoint).items())[:8])
        refined_models.keep(self._layers)
        weights = {f"layer{n}": torch.ones(4, 4) * (n + 1) for n in range(20)}
        self._plan = make_plan(weights, made_up(), 0.25, scaled=True)
        search_cache.keep_findings(KEY, self._plan, 1)
        Catalogue(list).status()
        background.join()

    @staticmethod
    def forget() -> None:
        """Know no more than after a start."""
        for cache in (store.locked_file._cache, heads._known, heads._files):
            cache.clear()
        fingerprints._all.cache_clear()
        owners._kept = (None, None, owners._NOTHING)

    def sample(self) -> None:
        assert inprocess.sample(self._model).isfinite().all()

    def add(self) -> None:
        store.add_soon(store.NewSums(delta(), FINGERPRINT, "recorded", "toy.safetensors"))

    def look(self) -> None:
        Catalogue(list).status()
        settings.current()
        store.statistics_of(FINGERPRINT)
        store.sketches_of(FINGERPRINT)

    def export(self) -> None:
        export(self._path, self.target, self.settings, overwrite=True)

    def upload(self) -> None:
        take_in(self.sent, "theirs.pt")

    def keep(self) -> None:
        refined_models.keep(self._layers)
        refined.find(refined_models.KEY)
        search_cache.keep_findings(KEY, self._plan, 2)
        search_cache.find_findings(KEY)
        heads.forget(FINGERPRINT)
        sweep_folders()

    def tell_apart(self) -> None:
        fingerprints.fingerprint(self._path)


EXPECTED: dict[str, tuple[type[Exception], ...]] = {
    "sample": (), "add": FAILS, "look": (), "export": (*FAILS, ValueError), "upload": FAILS,
    "keep": (), "tell_apart": (OSError,),
}  # fmt: skip
"""What may be raised; the picture, the panel and caches may not fail at all."""

MAY_ALSO_FAIL = {
    ("EIO when it is read", "sample"),
    ("no more file descriptors", "sample"),
    ("no more file descriptors", "look"),
}
"""ComfyUI samples only where it can read of /proc how much memory there is. Where no folder can be
listed, the panel says so."""


@pytest.fixture(scope="module")
def work(checkpoint, statistics, tmp_path_factory) -> Iterator[Work]:
    """All that it takes, made once."""
    folder = tmp_path_factory.mktemp("faults")
    path = folder / "sent.pt"
    meta = {"fingerprint": FINGERPRINT, "recording": "cd" * 8, "model": "toy.safetensors"}
    save_statistics(delta(**meta), path)
    recorder, own = Recorder(), CFGGuider.outer_sample
    with pytest.MonkeyPatch.context() as monkeypatch, torch.inference_mode():
        use_folders(folder, monkeypatch)
        recorder.install()
        try:
            yield Work(checkpoint, statistics, path)
        finally:
            CFGGuider.outer_sample = own


def temporary(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_loses_nothing_but_what_is_new(fault: str, work: Work):
    logging.disable(logging.CRITICAL)
    try:
        exported = work.target.read_bytes()
        for name, expected in EXPECTED.items():
            samples = store.statistics_of(FINGERPRINT).samples
            work.forget()
            if (fault, name) in MAY_ALSO_FAIL:
                expected = (OSError,)
            good, told = faults.with_fault(fault, getattr(work, name), expected)
            assert good, f"{name}: {told}"
            assert "\n" not in told
            work.forget()
            assert not temporary(work.folder), name
            left = store.statistics_of(FINGERPRINT)
            assert left.samples in (samples, samples + 1)
            assert samples_of(left) == left.samples
            assert work.target.read_bytes() == exported
            for path in work.folder.rglob("*.pt"):
                load_statistics(path)
            assert not list(work.folder.rglob("*.damaged"))
            assert search_cache.find_findings(KEY) is not None
    finally:
        logging.disable(logging.NOTSET)


class TestClock:
    """Files of tomorrow are what is there after a clock has gone backwards by a day."""

    @pytest.fixture
    def tomorrow(self, work: Work) -> Callable[[], None]:
        def make() -> None:
            then = time.time() + DAY
            for path in work.folder.rglob("*"):
                os.utime(path, (then, then))
            work.forget()

        return make

    def test_statistics_grow_on(self, work: Work, tomorrow):
        before = store.statistics_of(FINGERPRINT).samples
        tomorrow()
        for number in range(3):
            work.add()
            assert samples_of(store.statistics_of(FINGERPRINT)) == before + number + 1
            tomorrow()

    def test_all_the_rest_works(self, work: Work, tomorrow):
        tomorrow()
        stray = work.target.with_name(f".{work.target.name}.0123abcd.tmp")
        stray.write_bytes(b"half")
        tomorrow()
        for name in EXPECTED:
            getattr(work, name)()
        assert refined.find(refined_models.KEY) is not None
        assert search_cache.find_findings(KEY) is not None
        assert temporary(work.folder) == []
