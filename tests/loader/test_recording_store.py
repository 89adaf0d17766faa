"""Recorded statistics are not lost: two processes, processes that are killed, what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import folder_paths
import pytest
import torch
from harness.sums import FINGERPRINT, delta, samples_of
from hswq.calibration import NOISE_LEVELS, LayerStatistics, Statistics, load_statistics
from hswq.loader import store
from hswq.loader.host.folders import FOLDER
from hswq.loader.panel.catalogue import Catalogue
from hswq.loader.store import locked_file

HERE = Path(__file__).parent
KILLS = int(os.environ.get("HSWQ_KILLS", "40"))


def add(**how) -> Statistics:
    return store.add_statistics(
        store.NewSums(delta(**how), FINGERPRINT, "recorded", "toy.safetensors")
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A statistics folder for the test alone."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path)], {".pt"}))
    return tmp_path


def script(folder: Path, name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(HERE / "recording_process.py"), name, str(folder),
            *map(str, arguments)]  # fmt: skip


class TestProcesses:
    def test_one_may_begin_anew_while_another_adds(self, folder):
        running = subprocess.Popen(script(folder, "add", 40))
        removed = 0
        while running.poll() is None:
            removed += store.remove_statistics(FINGERPRINT)
            time.sleep(0.02)
        assert running.returncode == 0
        assert removed
        left = store.statistics_of(FINGERPRINT)
        assert (0 if left is None else samples_of(left)) < 40
        assert not list(folder.glob("*.damaged"))
        assert samples_of(add()) == (1 if left is None else left.samples + 1)

    def test_two_add_up(self, folder):
        running = [subprocess.Popen(script(folder, "add", 200)) for _ in range(2)]
        assert [process.wait(120) for process in running] == [0, 0]
        (path,) = folder.glob("*.pt")
        assert samples_of(load_statistics(path)) == 400
        assert not list(folder.glob(".*.tmp"))

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
    def test_killed_at_any_moment(self, folder):
        """Each child records and saves until it is killed, and says so after every save."""
        done = subprocess.run(
            script(folder, "kill", KILLS), capture_output=True, text=True, timeout=60 + 2 * KILLS
        )
        assert done.returncode == 0, done.stderr
        assert f"{KILLS} kills" in done.stdout
        add()
        assert not list(folder.glob(".*.tmp"))


class TestFiles:
    def test_what_a_killed_process_left_is_swept(self, folder):
        add()
        (path,) = folder.glob("*.pt")
        stray = folder / f".{path.name}.0123abcd.tmp"
        others = folder / ".other.pt.0123abcd.tmp"
        for left in (stray, others):
            left.write_bytes(b"half a file")
        add()
        assert not stray.exists()
        assert others.exists(), "its own process may be writing it"

    def test_a_damaged_one_is_set_aside(self, folder, caplog):
        add()
        (path,) = folder.glob("*.pt")
        path.write_bytes(b"damaged")
        assert samples_of(add()) == 1
        assert path.with_name(path.name + ".damaged").read_bytes() == b"damaged"
        assert "a new one is begun" in caplog.text

    def test_is_not_read_again_until_it_changes(self, folder):
        add()
        first = store.statistics_of(FINGERPRINT)
        assert store.statistics_of(FINGERPRINT) is first
        (path,) = folder.glob("*.pt")
        path.write_bytes(path.read_bytes())
        again = store.statistics_of(FINGERPRINT)
        assert again is not first
        assert samples_of(again) == 1

    def test_those_of_another_process_are_seen(self, folder):
        assert samples_of(add()) == 1
        subprocess.run(script(folder, "add", 3), check=True)
        assert samples_of(store.statistics_of(FINGERPRINT)) == 4
        assert samples_of(add()) == 5

    def test_of_windows_one_that_is_being_read_is_waited_for(self, folder, monkeypatch):
        monkeypatch.setattr(locked_file, "_PATIENCE", (0.01, 0.01))
        save, failures = locked_file.save_statistics, [PermissionError(), PermissionError()]

        def busy(*arguments):
            if failures:
                raise failures.pop()
            save(*arguments)

        monkeypatch.setattr(locked_file, "save_statistics", busy)
        add()
        assert samples_of(store.statistics_of(FINGERPRINT)) == 1
        failures += [PermissionError("in use")] * 3
        with pytest.raises(OSError, match="cannot be written"):
            add()
        assert samples_of(store.statistics_of(FINGERPRINT)) == 1

    def test_a_lock_that_is_never_given_back(self, folder, monkeypatch):
        import filelock

        monkeypatch.setattr(locked_file, "_LOCK_SECONDS", 0.1)
        add()
        (path,) = folder.glob("*.pt")
        with filelock.FileLock(f"{path}.lock"), pytest.raises(OSError, match="lock"):
            add()


def folder_at(path: Path) -> None:
    path.mkdir()


def loop_at(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes, and no links without rights")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [folder_at, loop_at, os.mkfifo], ids=["folder", "loop", "pipe"])
class TestOneThatCannotBeRead:
    def neighbour(self, folder: Path, make, session: str = "theirs") -> Path:
        path = folder / f"toy.{FINGERPRINT[:16]}.{session}.pt"
        make(path)
        return path

    def test_stops_no_other(self, folder, make, caplog):
        add()
        path = self.neighbour(folder, make)
        assert samples_of(add()) == 2
        assert samples_of(store.statistics_of(FINGERPRINT)) == 2
        assert f"{path.name} cannot be read: " in caplog.text

    def test_is_named_in_the_panel(self, folder, make):
        add()
        path = self.neighbour(folder, make)
        catalogue = Catalogue(list)
        for _ in range(2):
            (model,) = catalogue.models()
            state, reason = model.state()
            assert state == "recording"
            assert reason.startswith(f"{path.name} cannot be read: ")
            assert "[Errno" not in reason

    def test_is_named_where_it_should_grow(self, folder, make):
        path = self.neighbour(folder, make, "recorded")
        with pytest.raises(OSError, match=rf"^{path.name} cannot be read: "):
            add()
        assert os.path.lexists(path)

    def test_leaves_the_others_to_be_removed(self, folder, make):
        add()
        path = self.neighbour(folder, make, "a")
        if path.is_dir():
            with pytest.raises(OSError, match=rf"^{path.name} cannot be removed: "):
                store.remove_statistics(FINGERPRINT)
        else:
            store.remove_statistics(FINGERPRINT)
        assert store.statistics_of(FINGERPRINT) is None


def measured(samples: int, layers: int = 3, calls: int = 8, **meta) -> Statistics:
    """Statistics of so many images, whose layers were measured so often."""
    one = LayerStatistics(1.0, 2.0, calls, torch.ones(4, dtype=torch.float64), calls)
    facts = {"samples": samples, "layers": 3, **meta}
    return Statistics({f"layer{n}": one for n in range(layers)}, facts)


class TestUsable:
    def test_with_every_layer_and_enough_samples(self):
        assert store.is_usable(measured(32))
        assert store.missing(measured(31)) == store.IMAGES

    def test_not_while_a_layer_is_missing(self):
        assert store.missing_layers(measured(300, layers=2)) == 1
        assert store.missing(measured(300, layers=2)) == store.LAYERS
        assert not store.is_complete(measured(300, layers=2))

    def test_not_of_one_large_batch(self):
        """32 images of 20 steps, measured by turns: the layers kept are others each time."""
        assert store.missing(measured(32, calls=1)) == store.CALLS
        assert not store.is_complete(measured(300, calls=7))
        assert store.is_usable(measured(32, calls=8))

    def test_not_of_a_few_levels_of_noise(self):
        low = {NOISE_LEVELS: "0 0 0 0 0 0 9 99"}
        assert store.missing(measured(32, calls=100, **low)) == store.NOISE
        assert store.is_usable(measured(32, **{NOISE_LEVELS: "1 0 1 0 0 1 0 1"}))

    @pytest.mark.parametrize("levels", ["9 9", "many", 7, "-1 0 0 0 0 0 0 0", ""])
    def test_files_that_do_not_say_which_levels(self, levels):
        assert store.is_usable(measured(32, **{NOISE_LEVELS: levels}))

    def test_what_is_never_seen_is_waited_for_no_longer(self):
        """A layer that the model never calls, a user who never samples elsewhere."""
        never = (
            measured(512, layers=2),
            measured(512, calls=1),
            measured(256, **{NOISE_LEVELS: "9 0 0 0 0 0 0 0"}),
        )
        for one in never:
            assert store.is_complete(one)
            assert store.is_usable(one)

    @pytest.mark.parametrize("layers", [None, "many", -1, True, 2.5])
    def test_files_that_do_not_say_how_many_layers(self, layers):
        assert store.missing_layers(odd(layers)) == 0


def odd(layers: object) -> Statistics:
    return Statistics(dict(delta()), {"samples": 1, "layers": layers})
