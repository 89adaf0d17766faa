"""Processes that are killed while they sample, export or write caches, and what must be true after.

Each is forked from a process that has ComfyUI in memory, so that hundreds take minutes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import folder_paths
import torch
from hswq.calibration import Statistics, load_statistics
from hswq.loader import store
from hswq.loader.files import fingerprints, owners
from hswq.loader.files.versions import version_of
from hswq.loader.files.whole_hash import background
from hswq.loader.jobs.export import export
from hswq.loader.jobs.leftovers import sweep_folders
from hswq.loader.recording.recorder import Recorder
from hswq.loader.store import effects, heads, refined, search_cache
from hswq.quant import make_plan

from harness import inprocess
from harness import refined as refined_models
from harness.exports import record, target_of, wanted
from harness.modelfiles import model_file
from harness.mutations import made_up
from harness.sums import FINGERPRINT, delta

WRITES, PLACED, DONE, FAILED = b"w", b"p", b".", b"x"
"""What a process tells: it opens a file to write it, puts it in its place, has done a piece."""

OLD = 120
"""Seconds after which nobody can be about to lock a temporary file that he has just made."""


class Victim:
    """Work that may be killed at any moment."""

    def work(self, number: int) -> None:
        """Do one piece of it."""
        raise NotImplementedError

    def check(self, done: int) -> None:
        """Check what is on disk after so many whole pieces, and maybe a part of another."""
        raise NotImplementedError


class Sampling(Victim):
    """The toy is sampled with, and recorded."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = inprocess.load_16_bit(checkpoint)
        self._fingerprint, self._samples = fingerprints.fingerprint(str(checkpoint)), 0
        self._recorder = Recorder()
        self._recorder.install()
        inprocess.sample(self._model)
        self._samples = store.statistics_of(self._fingerprint).samples

    def work(self, number: int) -> None:
        inprocess.sample(self._model)

    def check(self, done: int) -> None:
        (path,) = store.statistics_files(self._fingerprint)
        found = load_statistics(path)
        assert self._samples + done <= found.samples <= self._samples + done + 1
        self._samples = found.samples
        assert {layer.calls for layer in found.values()} == {found.samples}
        for sketches in filter(None, [store.sketches_of(self._fingerprint)]):
            assert all(sketches[name].matrix.isfinite().all() for name in sketches)


class Exporting(Victim):
    """The toy is exported to some files, over and over."""

    def __init__(self, checkpoint: Path, sums: Statistics) -> None:
        self._path, self._settings = str(checkpoint), wanted()
        record(self._path, sums)
        first = target_of(self._settings, "first")
        export(self._path, first, self._settings)
        self._digest = _digest(first)

    def work(self, number: int) -> None:
        target = target_of(self._settings, f"export{number % 3}")
        export(self._path, target, self._settings, overwrite=True)

    def check(self, done: int) -> None:
        for path in target_of(self._settings).parent.glob("export*.safetensors"):
            assert _digest(path) == self._digest


class Compensation(Victim):
    """What compensated rounding made is written to its cache."""

    def __init__(self, checkpoint: Path) -> None:
        self._layers = refined_models.fp8_layers(checkpoint)
        self._keys = [f"{refined_models.MODEL[:16]}.{digit * 32}" for digit in "01"]

    def work(self, number: int) -> None:
        refined_models.keep(self._layers, self._keys[number % 2])

    def check(self, done: int) -> None:
        found = [refined.find(key) for key in self._keys]
        assert sum(one is not None for one in found) >= min(done, 2)
        for one in filter(None, found):
            for name, (data, scale) in self._layers.items():
                kept_data, kept_scale = one.read(name, lambda mapped: mapped)
                assert kept_data.view(torch.uint8).equal(data.view(torch.uint8))
                assert kept_scale.equal(scale)
            one.close()


class Measuring(Victim):
    """Effects of layers are kept while they are measured, and when all are."""

    def __init__(self) -> None:
        self._layers = {f"layer{n}": 1.0 / (1 + n) for n in range(800)}
        self._begun = dict(list(self._layers.items())[:400])

    def work(self, number: int) -> None:
        for layers, whole in ((self._begun, False), (self._layers, True)):
            effects.keep_effects(FINGERPRINT, "scaled", effects.Effects(layers, "", whole))

    def check(self, done: int) -> None:
        whole = effects.find_effects(FINGERPRINT, "scaled")
        begun = effects.find_effects(FINGERPRINT, "scaled", whole=False)
        assert (whole is not None) >= (done > 0)
        assert whole is None or whole.layers == self._layers
        assert begun is None or begun.layers == self._begun


class Caches(Victim):
    """Search results, heads, fingerprints and hashes of files are written to theirs."""

    def __init__(self, folder: Path) -> None:
        weights = {f"layer{n}": torch.ones(4, 4) * (n + 1) for n in range(20)}
        self._plan = make_plan(weights, made_up(), 0.25, scaled=True)
        self._key = f"{FINGERPRINT[:16]}.{'0' * 32}"
        self._paths = [model_file(folder / f"model{n}.safetensors", n) for n in range(3)]
        self._its = [fingerprints.fingerprint(path) for path in self._paths]
        background.join()
        self._whole = [owners.whole_of(path, version_of(path)) for path in self._paths]
        store.add_statistics(store.NewSums(delta(), FINGERPRINT, "recorded", "toy.safetensors"))

    def work(self, number: int) -> None:
        search_cache.keep_findings(self._key, self._plan, number)
        heads._known.clear()
        heads._path(FINGERPRINT[:16]).unlink(missing_ok=True)
        heads.heads_of(FINGERPRINT[:16], keep=True)
        path, its = self._paths[number % 3], self._its[number % 3]
        fingerprints._remember(path, fingerprints._Known(*version_of(path), its))
        owners.note(path, version_of(path), self._whole[number % 3])

    def check(self, done: int) -> None:
        assert (search_cache.find_findings(self._key) is not None) >= (done > 0)
        heads._known.clear()
        assert store.head_of(FINGERPRINT).total.samples == 1
        fingerprints._all.cache_clear()
        for path, its, whole in zip(self._paths, self._its, self._whole, strict=True):
            assert fingerprints.known(path) == its
            assert owners.whole_of(path, version_of(path)) == whole


@dataclasses.dataclass
class Moments:
    """When processes were killed.

    Attributes:
        pieces: whole pieces of work that all of them had done.
        before: kills before the piece that was to be hit had opened a file to write it.
        writing: kills after that, while no file of the piece was in its place.
        between: kills after the first file of the piece was in its place; the piece was not done.
        after: kills when it was done.
    """

    pieces: int = 0
    before: int = 0
    writing: int = 0
    between: int = 0
    after: int = 0

    def note(self, told: bytes, target: int) -> int:
        """Count a kill by what its process has told; return how many pieces it had done."""
        *whole, rest = told.split(DONE)
        self.pieces += len(whole)
        if len(whole) > target:
            self.after += 1
        elif PLACED in rest:
            self.between += 1
        elif WRITES in rest:
            self.writing += 1
        else:
            self.before += 1
        return len(whole)


def kill(victim: Victim, count: int, seed: int) -> Moments:
    """Kill processes while they write, in their first or second piece of work.

    The moment is drawn over the time from the first file that the piece opens to its end, as long
    as that took for earlier pieces.
    """
    chance, found, spans = random.Random(seed), Moments(), []
    background.join()
    for _ in range(count):
        target = chance.choice((0, 0, 1)) if spans else 1
        told = _killed(victim.work, found.pieces, target, spans, chance)
        assert FAILED not in told, "the work has failed by itself"
        victim.check(found.note(told, target))
    return found


def _killed(
    work: Callable[[int], None], number: int, target: int, spans: list[float], chance: random.Random
) -> bytes:
    """Kill a process in a piece of its work; return what it has told, and append to `spans`."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _work(work, writing, number)
    os.close(writing)
    told, began = b"", 0.0
    while told.count(DONE) < target or told[-1:] in (b"", DONE):
        one = os.read(reading, 1)
        if not one:
            break  # it has failed
        if one == WRITES and told[-1:] in (b"", DONE):
            began = time.monotonic()
        elif one == DONE and began:
            spans.append(time.monotonic() - began)
        told += one
    time.sleep(chance.uniform(0, statistics.median(spans[-20:])))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reading, 1000):
        told += more
    os.close(reading)
    return told


def _work(work: Callable[[int], None], writing: int, number: int) -> None:
    """Work on until killed, and tell of files that are opened for writing, or put in place."""
    folders = folder_paths.models_dir, folder_paths.get_output_directory()

    def tell(event: str, arguments: tuple) -> None:
        if event in ("os.rename", "os.link"):
            os.write(writing, PLACED)
        elif event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            path = str(arguments[0])
            if path.startswith(folders) and not path.endswith(".lock"):
                os.write(writing, WRITES)

    try:
        sys.addaudithook(tell)
        while True:
            work(number)
            os.write(writing, DONE)
            number += 1
    except BaseException:
        traceback.print_exc()
        os.write(writing, FAILED)
    finally:
        os._exit(1)


def left_after_a_start() -> tuple[int, list[Path]]:
    """Return how many temporary files there were, and those that the next start leaves."""

    def temporary() -> list[Path]:
        folders = Path(folder_paths.models_dir), Path(folder_paths.get_output_directory())
        return [path for folder in folders for path in folder.rglob(".*.tmp")]

    before = temporary()
    for path in before:
        then = time.time() - OLD
        os.utime(path, (then, then))
    sweep_folders()
    return len(before), temporary()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
