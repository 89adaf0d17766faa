"""Sketches on disk: written seldom, merged, and never in the way of the sums."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import folder_paths
import pytest
import torch
from harness.inprocess import sample
from harness.recording import recorded
from harness.sketches import (
    MODEL,
    SHARED,
    assert_sum,
    new_sketches,
    record,
    rewritten,
    sidecar,
)
from hswq.calibration.sketch import SIZE
from hswq.loader import store
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.host.folders import FOLDER
from hswq.loader.store import sketch_file, sketches
from hswq.loader.store.merge import gather
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Nothing in memory but the test's own."""
    monkeypatch.setattr(sketches, "_held", {})
    return sketches._held


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes ComfyUI another machine's, and returns its statistics folder."""

    def switch(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(folder)], {".pt"}))
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        return folder

    return switch


class TestFile:
    def test_lies_beside_and_says_what_it_is(self, folder):
        record(0)
        (statistics,) = folder.glob("*.pt")
        path = sidecar(folder)
        assert path.name == statistics.name[:-3] + sketch_file.SUFFIX
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        ids = " ".join(store.recordings(store.statistics_of(MODEL)))
        assert metadata == {
            "format": sketch_file.FORMAT, "size": str(SIZE), "fingerprint": MODEL,
            "session": store.PASSIVE_SESSION, "recordings": ids,
            "layers": json.dumps([list(SHARED), ["out"]], separators=(",", ":")),
        }  # fmt: skip

    def test_samplings_add_up(self, folder):
        parts = [record(seed) for seed in range(3)]
        assert_sum(store.sketches_of(MODEL), *parts)

    def test_who_shares_one_has_one_object(self, folder):
        record(0)
        found = store.sketches_of(MODEL)
        q, v = found["q"], found["v"]
        assert q is v
        assert found["out"] is not q

    def test_nobody_takes_it_for_statistics(self, folder):
        record(0)
        assert len(store.statistics_files(MODEL)) == 1
        assert not [name for name in folder_paths.get_filename_list(FOLDER) if "sketch" in name]

    def test_without_it_all_is_as_before(self, folder):
        record(0)
        before = store.statistics_of(MODEL).samples
        sidecar(folder).unlink()
        assert store.sketches_of(MODEL) is None
        new = record(1)
        assert store.statistics_of(MODEL).samples == before + 1
        assert_sum(store.sketches_of(MODEL), new)

    def test_is_removed_with_its_statistics(self, folder):
        record(0)
        store.remove_statistics(MODEL)
        assert not list(folder.glob("*.pt"))
        assert not list(folder.glob("*.safetensors"))

    def test_begun_anew_it_has_nothing_of_before(self, folder, monkeypatch):
        monkeypatch.setattr(sketches, "BYTES_A_SAMPLING", 0)
        record(0)
        store.remove_statistics(MODEL)
        assert_sum((record(1), store.sketches_of(MODEL))[1], new_sketches(1))

    def test_of_a_process_that_was_killed_nothing_is_left(self, folder):
        record(0)
        path = sidecar(folder)
        stray = path.with_name(f".{path.name}.0123abcd.tmp")
        stray.write_bytes(b"half")
        record(1)
        assert not stray.exists()


class TestSeldom:
    @pytest.fixture(autouse=True)
    def large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if the sketches were so large as to be written every fourth sampling."""
        size = SIZE * (4 + 6)
        monkeypatch.setattr(sketches, "BYTES_A_SAMPLING", size // 4)

    def test_every_some_samplings(self, folder):
        parts, written = [], []
        for seed in range(9):
            parts.append(record(seed))
            written.append([path.stat().st_mtime_ns for path in folder.glob("*.safetensors")])
        assert written[:3] == [[], [], []]
        assert written[3] == written[4] == written[6] < written[7] == written[8]
        assert_sum(store.sketches_of(MODEL), *parts)

    @pytest.mark.parametrize("before", [31, 63, 127, 255])
    def test_at_milestones(self, folder, before):
        record(0, samples=before)
        sketches.write_held()
        new = record(1)
        assert not sketches._held
        assert_sum(store.sketches_of(MODEL), new_sketches(0), new)

    def test_sums_never_wait(self, folder, held):
        for seed in range(3):
            record(seed)
        held.clear()  # as in a process that was killed
        assert store.statistics_of(MODEL).samples == 3
        assert store.sketches_of(MODEL) is None

    def test_what_waits_of_removed_statistics_is_forgotten(self, folder):
        record(0)
        store.remove_statistics(MODEL)
        sketches.write_held()
        assert not list(folder.glob("*.safetensors"))
        record(1)
        assert_sum(store.sketches_of(MODEL), new_sketches(1))

    def test_what_cannot_be_written_waits(self, folder, monkeypatch, caplog):
        def fail(*_):
            raise OSError("No space left on device")

        with monkeypatch.context() as full:
            full.setattr(sketch_file, "atomic_file", fail)
            parts = [record(seed) for seed in range(4)]
        assert "are not written yet: No space left on device" in caplog.text
        parts.append(record(4))
        assert_sum(store.sketches_of(MODEL), *parts)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncate,
    "a header of a terabyte": huge_header,
    "no safetensors": lambda path: path.write_bytes(b"x" * 1000),
    "no metadata": lambda path: save_file(load_file(path), path),
    "another format": lambda path: rewritten(path, lambda _, m: m.update(format="v9")),
    "another size": lambda path: rewritten(path, lambda _, m: m.update(size="64")),
    "another model": lambda path: rewritten(path, lambda _, m: m.update(fingerprint="cd" * 32)),
    "another recording": lambda path: rewritten(path, lambda _, m: m.update(recordings="ee")),
    "of no recording": lambda path: rewritten(path, lambda _, m: m.update(recordings="")),
    "layers are no JSON": lambda path: rewritten(path, lambda _, m: m.update(layers="[")),
    "layers are nested": lambda path: rewritten(path, lambda _, m: m.update(layers="[" * 10**5)),
    "layers are numbers": lambda path: rewritten(path, lambda _, m: m.update(layers="[[1],[2]]")),
    "layers are a table": lambda path: rewritten(path, lambda _, m: m.update(layers="{}")),
    "a layer twice": lambda path: rewritten(
        path, lambda _, m: m.update(layers='[["q","k"],["v","q"]]')
    ),
    "a sketch of nobody": lambda path: rewritten(path, lambda _, m: m.update(layers='[["q"],[]]')),
    "more sketches": lambda path: rewritten(
        path, lambda _, m: m.update(layers='[["q"],["k"],["v"]]')
    ),
    "other channels": lambda path: rewritten(
        path, lambda t, _: t.update({"0": torch.zeros(SIZE, 9, dtype=torch.int8)})
    ),
    "other rows": lambda path: rewritten(
        path, lambda t, _: t.update({"0": torch.zeros(3, 4, dtype=torch.int8)})
    ),
    "another dtype": lambda path: rewritten(path, lambda t, _: t.update({"0": t["0"].float()})),
    "no scale": lambda path: rewritten(path, lambda t, _: t.pop("0.scale")),
    "too many scales": lambda path: rewritten(
        path, lambda t, _: t.update({"0.scale": t["1.scale"].clone()})
    ),
    "rows below 0": lambda path: rewritten(path, lambda t, _: t["rows"].fill_(-1)),
    "no rows": lambda path: rewritten(path, lambda t, _: t.pop("rows")),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_is_left_out_with_a_sentence(self, folder, damage, caplog):
        record(0)
        path = sidecar(folder)
        DAMAGE[damage](path)
        assert store.sketches_of(MODEL) is None
        assert caplog.text.count(f"{path.name} is not used: ") == 1
        assert store.statistics_of(MODEL).samples == 1

    def test_the_next_sampling_begins_a_new_one(self, folder):
        record(0)
        truncate(sidecar(folder))
        assert_sum((record(1), store.sketches_of(MODEL))[1], new_sketches(1))
        assert store.statistics_of(MODEL).samples == 2

    def test_a_sketch_that_is_not_finite_is_none(self, folder, caplog):
        record(0)
        rewritten(sidecar(folder), lambda t, _: t["0.scale"][2].fill_(torch.inf))
        found = store.sketches_of(MODEL)
        assert found.get("q") is None
        assert found["out"].rows == 10
        assert "the sketch of q is damaged" in caplog.text
        with pytest.raises(KeyError):
            found["k"]
        record(1)
        found = store.sketches_of(MODEL)
        assert (found["q"].rows, found["out"].rows) == (11, 21)

    def test_of_anothers_statistics_it_does_not_count(self, machine):
        """As when a downloaded file takes the place of the one that was recorded."""
        theirs, ours = machine("theirs"), machine("ours")
        record(0)
        machine("theirs")
        record(1)
        shutil.copy(next(theirs.glob("*.pt")), next(ours.glob("*.pt")))
        machine("ours")
        assert store.statistics_of(MODEL).samples == 1
        assert store.sketches_of(MODEL) is None


class TestTotals:
    def test_sessions_add_up(self, folder):
        parts = [record(seed, session) for seed, session in enumerate(("recorded", "mine"))]
        assert_sum(store.sketches_of(MODEL), *parts)

    def test_a_recording_counts_once(self, machine):
        theirs = machine("theirs")
        parts = [record(seed) for seed in range(2)]
        ours = machine("ours")
        for path in theirs.glob("toy.*"):
            if not path.name.endswith(".lock"):
                shutil.copy(path, ours / path.name.replace(".recorded.", ".copy."))
                shutil.copy(path, ours / path.name)
        assert_sum(store.sketches_of(MODEL), *parts)

    def test_machines_merge(self, machine):
        parts, files = [], []
        for seed in range(2):
            files.append(machine(f"machine{seed}"))
            parts.append(record(seed))
        central = machine("central")
        for number, folder in enumerate(files):
            shutil.copytree(folder, central / "farm" / str(number))
        for _ in range(2):  # again, nothing counts twice
            gather("farm", "merged")
            assert_sum(store.sketches_of(MODEL), *parts)
        sidecar(central / "farm" / "1").unlink()
        gather("farm", "merged")
        assert_sum(store.sketches_of(MODEL), parts[0])
        sidecar(central / "farm" / "0").unlink()
        gather("farm", "merged")
        assert store.sketches_of(MODEL) is None
        assert store.statistics_of(MODEL).samples == 2


def test_a_sampling_leaves_sketches(recorder, model, checkpoint):
    sample(model)
    found = store.sketches_of(fingerprint(str(checkpoint)))
    assert recorded(checkpoint).samples == 1
    assert set(recorded(checkpoint)) >= {names[0] for names in found.groups().values()}
    context = [names for names in found.groups().values() if any("attn2.to_v" in n for n in names)]
    assert len(context) <= 1, "all read the same context"
    for name in found:
        sketch = found[name]
        assert sketch.rows > 0
        assert sketch.matrix.any()
