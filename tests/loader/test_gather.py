"""What a farm's machines recorded, merged into one session."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import folder_paths
import pytest
import torch
from helpers import assert_same_layers, statistics_of
from hswq.calibration import Statistics, load_statistics, save_statistics
from hswq.loader import store
from hswq.loader.host.folders import FOLDER
from hswq.loader.store.merge import ALL, COUNTED, Gathered, folders, gather

MODEL = "ab" * 32
OTHER = "cd" * 32
LAYERS = ("input_blocks.0.0", "out.2")


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


def record(seed: int, samples: int = 8, model: str = MODEL) -> Statistics:
    """Record into this machine's file, and return what was added."""
    delta = statistics_of(*LAYERS, seed=seed, samples=samples, total_steps=4)
    store.add_statistics(
        store.NewSums(delta, model, store.PASSIVE_SESSION, "toy.safetensors", LAYERS)
    )
    return delta


@pytest.fixture
def farm(machine):
    """Three machines' files, all of one name, in a folder each of the fourth; and their sums."""
    parts, files = [], {}
    for number, name in enumerate(("one", "two", "three")):
        folder = machine(name)
        parts.append(record(number))
        (files[name],) = folder.glob("*.pt")
    central = machine("central")
    for name, path in files.items():
        (central / "farm" / name).mkdir(parents=True)
        shutil.copy(path, central / "farm" / name)
    return central, functools.reduce(Statistics.merge, parts)


class TestGather:
    def test_is_the_sum(self, farm):
        central, total = farm
        assert store.statistics_of(MODEL) is None, "a folder below is nobody's session"
        written, left_out = gather("farm", "merged")
        path = central / f"toy.{MODEL[:16]}.merged.pt"
        assert (written, left_out) == ([Gathered(path, 24, 3)], {})
        assert_same_layers(load_statistics(path), total, rel=1e-15)
        found = store.statistics_of(MODEL)
        assert found.samples == 24
        assert found.fingerprint == MODEL
        assert found.meta["model"] == "toy.safetensors"

    def test_offers_folders(self, farm):
        assert folders() == [ALL, "farm", "farm/one", "farm/three", "farm/two"]

    def test_again_counts_nothing_twice(self, farm):
        gather("farm", "merged")
        first = store.statistics_of(MODEL)
        gather("farm", "merged")
        assert store.statistics_of(MODEL).samples == 24
        assert_same_layers(store.statistics_of(MODEL), first)

    def test_again_when_one_has_grown(self, farm, machine):
        central, total = farm
        gather("farm", "merged")
        one = machine("one")
        total = total.merge(record(7, samples=5))
        shutil.copy(next(one.glob("*.pt")), central / "farm" / "one")
        machine("central")
        gather("farm", "merged")
        assert store.statistics_of(MODEL).samples == 29
        assert_same_layers(store.statistics_of(MODEL), total, rel=1e-15)

    def test_of_copies_the_largest_counts(self, farm):
        central, _ = farm
        (path,) = (central / "farm" / "two").glob("*.pt")
        older = load_statistics(path)
        save_statistics(Statistics(older, {**older.meta, "samples": 3}), path.with_name("old.pt"))
        (written,), left_out = gather("farm", "merged")
        assert (written.samples, written.files) == (24, 3)
        assert left_out == {"farm/two/old.pt": COUNTED}

    def test_any_name_and_place(self, machine):
        central = machine("central")
        record(1)
        (path,) = central.glob("*.pt")
        path.rename(central / "from a colleague.pt")
        assert store.statistics_of(MODEL) is None
        gather(ALL, "merged")
        assert store.statistics_of(MODEL).samples == 8
        with pytest.raises(ValueError, match="has no statistics that do not count already"):
            gather(ALL, "again")
        assert store.statistics_of(MODEL).samples == 8

    def test_what_this_machine_has_itself_counts_once(self, farm):
        """Its own recording came back with the farm's files, and has grown since."""
        central, _ = farm
        record(5)
        (own,) = central.glob("*.pt")
        (central / "farm" / "own").mkdir()
        shutil.copy(own, central / "farm" / "own")
        record(6)
        _, left_out = gather("farm", "merged")
        assert left_out == {f"farm/own/{own.name}": COUNTED}
        assert store.statistics_of(MODEL).samples == 24 + 16

    def test_a_part_dropped_beside_the_sum_counts_once(self, farm):
        central, _ = farm
        gather("farm", "merged")
        (part,) = (central / "farm" / "one").glob("*.pt")
        shutil.copy(part, central / f"toy.{MODEL[:16]}.dropped.pt")
        assert store.statistics_of(MODEL).samples == 24

    def test_of_merged_ones(self, farm, machine):
        """Two sites that merge, and a third that merges theirs; one machine is in both."""
        central, _ = farm
        (path,) = (written.path for written in gather("farm", "merged")[0])
        top = machine("top")
        (top / "sites").mkdir()
        shutil.copy(path, top / "sites" / "a.pt")
        shutil.copy(next((central / "farm" / "one").glob("*.pt")), top / "sites" / "b.pt")
        (written,), left_out = gather("sites", "merged")
        assert written.samples == 24
        assert left_out == {"sites/b.pt": COUNTED}

    def test_several_models(self, machine):
        central = machine("central")
        record(1)
        record(2, model=OTHER)
        (central / "farm").mkdir()
        for path in central.glob("*.pt"):
            path.rename(central / "farm" / path.name)
        written, _ = gather("farm", "merged")
        assert sorted(one.samples for one in written) == [8, 8]
        assert [store.statistics_of(model).samples for model in (MODEL, OTHER)] == [8, 8]

    def test_leaves_out_what_is_none(self, farm):
        central, _ = farm
        (central / "farm" / "damaged.pt").write_bytes(b"damaged")
        torch.save({"weights": torch.ones(3)}, central / "farm" / "weights.pt")
        save_statistics(statistics_of(*LAYERS, samples=1), central / "farm" / "unknown.pt")
        odd = statistics_of("another", *LAYERS, samples=1, fingerprint=MODEL)
        save_statistics(odd, central / "farm" / "z.pt")
        (written,), left_out = gather("farm", "merged")
        assert (written.samples, written.files) == (24, 3)
        assert {name: reason.split(":")[0] for name, reason in left_out.items()} == {
            "farm/damaged.pt": "damaged.pt cannot be read as a statistics file",
            "farm/weights.pt": "weights.pt is not an HSWQ statistics file",
            "farm/unknown.pt": "it does not say which weights it is of",
            "farm/z.pt": "layer 'input_blocks.0.0'",
        }


class TestSession:
    def test_with_recordings_of_its_own_is_refused(self, farm):
        record(9)
        before = store.statistics_of(MODEL)
        with pytest.raises(ValueError, match="session 'recorded' has recordings of its own"):
            gather("farm", "recorded")
        assert store.statistics_of(MODEL) is before

    def test_that_is_recorded_into_later_is_kept(self, farm):
        """Its first samples may be the farm's."""
        gather("farm", store.PASSIVE_SESSION)
        record(9)
        assert store.statistics_of(MODEL).samples == 32
        with pytest.raises(ValueError, match="recordings of its own"):
            gather("farm", store.PASSIVE_SESSION)
        assert store.statistics_of(MODEL).samples == 32

    @pytest.mark.parametrize("session", ["", "../evil", "a b"])
    def test_that_is_no_plain_word(self, farm, session):
        with pytest.raises(ValueError, match="the session must be"):
            gather("farm", session)

    @pytest.mark.parametrize("folder", ["..", "farm/..", "/etc", "nowhere", ""])
    def test_folders_that_are_none(self, farm, folder):
        with pytest.raises(ValueError, match="there is no folder"):
            gather(folder, "merged")
