"""Between milestones a model is rounded by the same sketches, whatever is recorded meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import folder_paths
import pytest
import torch
from harness.sketches import MODEL, assert_sum, new_sketches, record, rewritten, sidecar
from hswq.loader import store
from hswq.loader.host.folders import FOLDER
from hswq.loader.store import locked_file, milestones, sketch_file, sketches
from hswq.loader.store.merge import gather

OTHER_SESSION = "by-hand"


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Nothing in memory but the test's own; all that comes waits there, as SDXL's does."""
    monkeypatch.setattr(sketches, "_held", {})
    monkeypatch.setattr(sketches, "BYTES_A_SAMPLING", 1)
    return sketches._held


def sampled(seed: int, samples: int, session: str = store.PASSIVE_SESSION) -> dict:
    """Record so much that only images may be missing."""
    return record(seed, session, samples, calls=8)


def kept(folder: Path) -> Path:
    return folder / f"{MODEL[:16]}.milestone{sketch_file.SUFFIX}"


def contents(found: store.Sketches) -> dict[str, list]:
    return {name: found[name].matrix.tolist() for name in found}


class TestSameSketches:
    def test_are_all_up_to_the_milestone(self, folder):
        parts = [sampled(0, 20), sampled(1, 20)]
        assert_sum(store.quantizing_sketches(MODEL), *parts)

    def test_whatever_is_recorded_meanwhile(self, folder):
        sampled(0, 40)
        before = store.quantizing_sketches(MODEL)
        sampled(1, 10)
        sampled(2, 10, OTHER_SESSION)
        store.write_held()
        after = store.quantizing_sketches(MODEL)
        assert contents(after) == contents(before)
        assert after.version == before.version
        assert_sum(store.sketches_of(MODEL), *map(new_sketches, range(3)))

    def test_though_nothing_asked_for_them_at_the_milestone(self, folder):
        part = sampled(0, 40)
        sampled(1, 10)
        assert_sum(store.quantizing_sketches(MODEL), part)

    def test_of_all_sessions(self, folder):
        parts = [sampled(0, 20), sampled(1, 20, OTHER_SESSION)]
        assert_sum(store.quantizing_sketches(MODEL), *parts)

    def test_none_stay_none(self, folder):
        sampled(0, 31)
        store.write_held()
        sidecar(folder).unlink()
        # As of a sampling whose sketches were left out.
        delta = store.statistics_of(MODEL)
        delta = type(delta)(delta, {"samples": 9, "layers": 4})
        store.add_statistics(store.NewSums(delta, MODEL, store.PASSIVE_SESSION, "toy.safetensors"))
        assert store.quantizing_sketches(MODEL) is None
        new = sampled(1, 10)
        assert store.quantizing_sketches(MODEL) is None
        assert_sum(store.sketches_of(MODEL), new)

    def test_before_the_first_milestone_there_are_none(self, folder):
        assert store.quantizing_sketches(MODEL) is None
        sampled(0, 31)
        assert store.quantizing_sketches(MODEL) is None
        assert not kept(folder).exists()


class TestOtherSketches:
    def test_at_the_next_milestone(self, folder):
        first = sampled(0, 40)
        before = store.quantizing_sketches(MODEL).version
        second = sampled(1, 24)
        after = store.quantizing_sketches(MODEL)
        assert_sum(after, first, second)
        assert after.version != before

    def test_without_a_session_that_was_removed(self, folder):
        part = sampled(0, 40)
        sampled(1, 10, OTHER_SESSION)
        sampled(2, 20)
        store.remove_statistics(MODEL, OTHER_SESSION)
        assert_sum(store.quantizing_sketches(MODEL), part, new_sketches(2))

    def test_of_what_was_begun_anew(self, folder):
        sampled(0, 40)
        store.remove_statistics(MODEL)
        assert not kept(folder).exists()
        new = sampled(1, 40)
        assert_sum(store.quantizing_sketches(MODEL), new)

    def test_with_what_was_merged(self, folder, tmp_path, monkeypatch):
        """A farm's samplings reach the milestone together."""
        parts = []
        for number in range(2):
            machine = tmp_path / f"machine{number}"
            use(machine, monkeypatch)
            parts.append(sampled(number, 20))
            store.write_held()
        use(tmp_path / "central", monkeypatch)
        for number in range(2):
            source = tmp_path / f"machine{number}"
            shutil.copytree(source, tmp_path / "central" / "farm" / str(number))
        gather("farm", "merged")
        assert_sum(store.quantizing_sketches(MODEL), *parts)


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ComfyUI another machine's."""
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(folder)], {".pt"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "another model": lambda path: rewritten(path, lambda _, m: m.update(fingerprint="cd" * 32)),
    "another recording": lambda path: rewritten(path, lambda _, m: m.update(recordings="ee")),
    "another milestone": lambda path: rewritten(path, lambda _, m: m.update(samples="32")),
    "no milestone": lambda path: rewritten(path, lambda _, m: m.pop("samples")),
}


class TestTheFile:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_that_is_not_its_own_is_left_out(self, folder, damage, caplog):
        sampled(0, 40)
        DAMAGE[damage](kept(folder))
        assert store.quantizing_sketches(MODEL) is None
        assert caplog.text.count(f"{kept(folder).name} is not used: ") == 1
        assert store.quantizing_statistics(MODEL).samples == 40
        sampled(1, 24)
        assert_sum(store.quantizing_sketches(MODEL), new_sketches(0), new_sketches(1))

    def test_is_no_sessions(self, folder):
        sampled(0, 40)
        store.write_held()
        (session,) = folder.glob("*.recorded.pt")
        shutil.copy(kept(folder), sketch_file.beside(session))
        assert store.sketches_of(MODEL) is None

    def test_is_removed_though_its_milestone_is_gone(self, folder):
        sampled(0, 40)
        (folder / f"{MODEL[:16]}.milestone").unlink()
        store.remove_statistics(MODEL)
        assert not kept(folder).exists()

    def test_goes_where_a_milestone_has_none(self, folder):
        sampled(0, 40)
        store.write_held()
        for path in folder.glob(f"*{sketch_file.SUFFIX}"):
            if path != kept(folder):
                path.unlink()
        delta = store.statistics_of(MODEL)
        delta = type(delta)(delta, {"samples": 30, "layers": 4})
        store.add_statistics(store.NewSums(delta, MODEL, store.PASSIVE_SESSION, "toy.safetensors"))
        assert not kept(folder).exists()
        assert store.quantizing_sketches(MODEL) is None

    def test_of_a_process_that_was_killed_in_between_counts_for_nothing(
        self, folder, monkeypatch, caplog
    ):
        """Its sketches are written, its statistics are not."""
        first = sampled(0, 40)

        def killed(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as dying:
            dying.setattr(milestones.locked_file, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                total = store.statistics_of(MODEL)
                more = type(total)(total, {**total.meta, "samples": 64})
                milestones.at_milestone(MODEL, more)
        assert store.quantizing_statistics(MODEL).samples == 40
        assert store.quantizing_sketches(MODEL) is None
        assert "to another milestone" in caplog.text
        second = sampled(1, 24)
        assert_sum(store.quantizing_sketches(MODEL), first, second)

    def test_that_cannot_be_written_costs_nobody_a_recording(self, folder, caplog):
        kept(folder).mkdir(parents=True)
        part = sampled(0, 40)
        assert "is not kept" in caplog.text
        assert store.statistics_of(MODEL).samples == 40
        kept(folder).rmdir()
        assert_sum(store.quantizing_sketches(MODEL), part)


class TestByName:
    """Who chooses a statistics file by its name has the sketches beside it, or none."""

    def test_has_its_own(self, folder):
        sampled(0, 40)
        other = sampled(1, 40, OTHER_SESSION)
        (path,) = folder.glob(f"*.{OTHER_SESSION}.pt")
        assert_sum(store.sketches_beside(path, locked_file.read(path)), other)

    def test_has_none_where_none_lie_beside_it(self, folder):
        sampled(0, 40)
        (path,) = folder.glob("*.recorded.pt")
        copy = shutil.copy(path, folder / "mine.pt")
        assert store.sketches_beside(Path(copy), locked_file.read(path)) is None


def test_versions_tell_sketches_apart(folder):
    versions = set()
    for seed in range(3):
        sampled(seed, 8)
        (path,) = folder.glob("*.pt")
        found = store.sketches_beside(path, locked_file.read(path))
        versions |= {found.version, store.sketches_beside(path, locked_file.read(path)).version}
    assert len(versions) == 3


def test_sketches_of_other_channels_cost_no_sums(folder, caplog):
    sampled(0, 8)
    delta = store.statistics_of(MODEL)
    delta = type(delta)(delta, {"samples": 8, "layers": 4})
    wrong = type(new_sketches(0)["q"])(torch.zeros(128, 9), 1)
    its = (MODEL, store.PASSIVE_SESSION, "toy.safetensors")
    store.add_statistics(store.NewSums(delta, *its, sketches={"q": wrong}))
    assert store.statistics_of(MODEL).samples == 16
    assert "sketches are not used" in caplog.text
    assert_sum(store.sketches_of(MODEL), new_sketches(0))
