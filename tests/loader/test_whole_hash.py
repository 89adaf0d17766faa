"""Two files with the same sample: told apart by all their bytes, and never one model then."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from harness import inprocess
from harness.modelfiles import an_hour_older, model_file
from hswq.calibration import LayerStatistics, Statistics
from hswq.loader import store
from hswq.loader.files import owners, whole_hash
from hswq.loader.files.fingerprints import fingerprint, is_decided, known, looked_up
from hswq.loader.files.model_file import ModelFile
from hswq.loader.files.versions import version_of
from hswq.loader.files.whole_hash import Background, StoppedError, background, read_whole
from hswq.loader.host.folders import FOLDER
from hswq.loader.jobs.choice import QUANTIZE_UNIFORMLY, choose
from hswq.loader.recording.reasons import UNDECIDED
from hswq.loader.store import heads
from hswq.quant import NUMBER_FORMATS, BySensitivity, QuantizeSettings
from safetensors.torch import load_file, save_file


def twin(path: str | Path, beside: str = "twin.safetensors") -> str:
    """Write a file with other weights where no sample looks; return its path."""
    weights = load_file(path)
    for weight in weights.values():
        if weight.numel() * weight.itemsize > 1024 or weight.shape == (16, 16):
            weight.view(-1)[: weight.numel() // 8] *= -3
    other = Path(path).with_name(beside)
    save_file(weights, other)
    an_hour_older(other)
    return str(other)


@pytest.fixture
def path(folders: Path, tmp_path: Path) -> str:
    return model_file(tmp_path / "model.safetensors")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch):
    """Lets files be hashed in the background, once it is set."""
    gate = threading.Event()
    monkeypatch.setattr(whole_hash, "AT_ONCE_BYTES", 0)
    monkeypatch.setattr(background, "busy", lambda: not gate.wait(60))
    yield gate
    gate.set()
    background.join()


def finish(later: threading.Event) -> None:
    later.set()
    background.join()


def added(its: str, samples: int = 32, **meta) -> None:
    one = LayerStatistics(1.0, 2.0, 8, torch.ones(16, dtype=torch.float64), 8)
    found = Statistics({f"{n}": one for n in range(4)}, {"samples": samples, "layers": 4, **meta})
    store.add_statistics(store.NewSums(found, its, "recorded", "model.safetensors"))


class TestHash:
    def test_sees_every_byte(self, path):
        before = read_whole(ModelFile(path))
        content = bytearray(Path(path).read_bytes())
        for entry in ModelFile(path).own.values():
            changed = bytearray(content)
            changed[entry.start] ^= 1
            Path(path).write_bytes(changed)
            assert read_whole(ModelFile(path)) != before

    def test_is_the_same_in_a_checkpoint_and_alone(self, checkpoint, tmp_path):
        whole = ModelFile(checkpoint)
        alone = tmp_path / "alone.safetensors"
        tensors = whole.tensors
        save_file({name: tensors[whole.prefix + name] for name in reversed(whole.own)}, alone)
        assert read_whole(ModelFile(alone)) == read_whole(whole)


class TestTwins:
    def test_look_the_same_in_the_sample(self, path):
        assert ModelFile(twin(path)).read_fingerprint() == ModelFile(path).read_fingerprint()

    def test_are_two_models(self, path):
        first, other = fingerprint(path), twin(path)
        assert looked_up(other) == first, "it was not read whole yet"
        second = fingerprint(other)
        assert first == ModelFile(path).read_fingerprint() != second
        assert len(second) == 64
        assert (fingerprint(path), fingerprint(other)) == (first, second)
        assert (known(path), looked_up(other)) == (first, second)

    def test_too_large_to_be_read_at_once_are_one_until_then(self, path, later):
        first, other = fingerprint(path), twin(path)
        assert fingerprint(other) == first
        assert is_decided(ModelFile(path))
        assert not is_decided(ModelFile(other))
        finish(later)
        assert is_decided(ModelFile(other))
        assert fingerprint(path) == first != fingerprint(other)

    def test_keep_their_own_statistics(self, path, later):
        added(fingerprint(path))
        other = twin(path)
        assert store.statistics_of(fingerprint(other)).samples == 32
        finish(later)
        assert store.statistics_of(fingerprint(path)).samples == 32
        assert store.statistics_of(fingerprint(other)) is None

    def test_share_no_plan_while_they_are_undecided(self, path, later, plans):
        added(fingerprint(path))
        other = ModelFile(twin(path))
        settings = QuantizeSettings(NUMBER_FORMATS["scaled"], BySensitivity(0.0))
        its = fingerprint(other), other.name, settings, QUANTIZE_UNIFORMLY
        assert choose("auto", *its, keep=is_decided(ModelFile(path))).key is not None
        assert choose("auto", *its, keep=is_decided(other)).key is None

    def test_a_copy_is_the_same_model(self, path, tmp_path):
        first, copy = fingerprint(path), tmp_path / "copy.safetensors"
        shutil.copy(path, copy)
        an_hour_older(copy)
        assert fingerprint(str(copy)) == first
        os.unlink(path)
        assert fingerprint(str(copy)) == first
        assert fingerprint(twin(copy)) != first

    def test_of_one_that_was_never_hashed_takes_its_place(self, path, later):
        first = fingerprint(path)
        other = twin(path)
        os.unlink(path)
        assert fingerprint(other) == first
        assert is_decided(ModelFile(other))

    def test_are_told_apart_after_a_start(self, path, monkeypatch):
        fingerprint(path)
        other = twin(path)
        second = fingerprint(other)
        monkeypatch.setattr(owners, "_kept", (None, None, owners._NOTHING))
        assert known(other) == second

    def test_sent_statistics_of_the_other_do_not_count(self, path):
        its, other = fingerprint(path), twin(path)
        fingerprint(other)
        added(its)
        stated = owners.whole_of(other, version_of(other))
        one = store.statistics_of(its)
        theirs = Statistics(one, {**one.meta, owners.WHOLE: stated, "recording": "ab" * 8})
        file = store.statistics_path(its, "theirs", "model.safetensors")
        store.locked_file.write(theirs, file)
        assert store.statistics_of(its).samples == 32
        (problem,) = heads.heads_of(its[:16]).problems
        assert problem.startswith(f"{file.name} is left out: it was recorded of other weights")


class TestKept:
    def test_once_for_each_version(self, path, tmp_path):
        fingerprint(path)
        background.join()
        before = owners.whole_of(path, version_of(path))
        assert before == read_whole(ModelFile(path))
        Path(path).write_bytes(Path(model_file(tmp_path / "other", seed=1)).read_bytes())
        assert owners.whole_of(path, version_of(path)) is None

    @pytest.mark.parametrize("damage", ["", "{}", "null", "[" * 100_000, "x" * 100])
    def test_what_is_damaged_is_begun_anew(self, path, folders, damage):
        first = fingerprint(path)
        background.join()
        kept = folders / "models" / FOLDER / "weights.cache"
        assert json.loads(kept.read_bytes().partition(b"\n")[2])["owners"][first][0] == path
        kept.write_text(damage)
        assert owners.whole_of(path, version_of(path)) is None
        assert fingerprint(path) == first
        background.join()
        assert owners.whole_of(path, version_of(path)) is not None

    def test_not_of_a_file_that_changes_meanwhile(self, path, later, monkeypatch):
        reading = threading.Event()
        monkeypatch.setattr(background, "busy", lambda: reading.set() or not later.wait(60))
        its = fingerprint(path)
        assert reading.wait(60)
        Path(path).write_bytes(Path(twin(path)).read_bytes())
        finish(later)
        assert owners.owner_of(its).whole is None
        assert owners.whole_of(path, version_of(path)) is None


class TestBackground:
    def test_has_no_thread_while_there_is_nothing_to_do(self, path):
        fingerprint(path)
        background.join()
        assert not [one for one in threading.enumerate() if one.name == "hswq hash"]

    def test_waits_long_where_others_work_and_ends_at_once_when_told(self):
        ours, ended = Background(), []
        ours.busy = lambda: True

        def work() -> None:
            try:
                ours._rest(10_000)
            except StoppedError:
                ended.append(True)

        thread = threading.Thread(target=work)
        thread.start()
        ours.stop()
        thread.join(60)
        assert ended == [True]
        ours.add("anything")
        assert ours._thread is None

    def test_a_file_that_is_gone_or_damaged_stops_nothing(self, path, tmp_path):
        damaged = tmp_path / "damaged.safetensors"
        damaged.write_bytes(b"x" * 100)
        for one in (str(tmp_path / "none.safetensors"), str(damaged), path):
            background.add(one)
        background.join()
        assert owners.whole_of(path, version_of(path)) is not None


class TestRecording:
    def test_is_of_each_file_alone(self, recorder, checkpoint, tmp_path, later):
        first = tmp_path / "first.safetensors"
        shutil.copy(checkpoint, first)
        an_hour_older(first)
        second = twin(first)
        inprocess.sample(inprocess.load_16_bit(first))
        its = fingerprint(str(first))
        model = inprocess.load_16_bit(Path(second))
        inprocess.sample(model)
        assert store.statistics_of(its).samples == 1
        assert recorder.status()[-1].reason == UNDECIDED
        finish(later)
        inprocess.sample(model)
        inprocess.sample(inprocess.load_16_bit(first))
        assert store.statistics_of(its).samples == 2
        theirs = store.statistics_of(fingerprint(second))
        assert theirs.samples == 1
        assert theirs.meta[owners.WHOLE] == owners.whole_of(second, version_of(second))
