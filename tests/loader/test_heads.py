"""What files hold is read once, kept on disk, and never read for another model's sake."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from harness.sums import FINGERPRINT, delta, samples_of
from hswq import calibration
from hswq.calibration import StatisticsError
from hswq.loader import store
from hswq.loader.files import kept_json
from hswq.loader.host import events
from hswq.loader.panel import catalogue
from hswq.loader.panel.catalogue import Catalogue
from hswq.loader.panel.preview import preview
from hswq.loader.store import heads, heads_file, locked_file, milestones
from hswq.quant import QuantizeSettings

OTHER = "cd" * 32
SESSIONS = 8  # more than are kept in memory whole


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Notes which statistics files are read while somebody waits for it."""
    found = []

    def noted(path):
        if threading.current_thread() is threading.main_thread():
            found.append(path)
        return calibration.load_statistics(path)

    for module in (heads, locked_file):
        monkeypatch.setattr(module, "load_statistics", noted)
    return found


@pytest.fixture
def restart(reads: list[Path]):
    """Forgets what is in memory, and what was read before."""

    def forget() -> None:
        for cache in (heads._known, heads._files, heads._on_disk, locked_file._cache):
            cache.clear()
        reads.clear()

    return forget


def add(of: str = FINGERPRINT, session: str = "recorded", **meta):
    return store.add_statistics(store.NewSums(delta(**meta), of, session, "toy.safetensors"))


@pytest.fixture
def many(folder: Path, restart) -> None:
    """Two models of many sessions, copied here while ComfyUI did not run."""
    for of in (FINGERPRINT, OTHER):
        for number in range(SESSIONS):
            add(of, f"s{number}")
        for one in (folder / "plans").glob("*"):
            one.unlink()
    restart()


def kept_files(folder: Path, of: str = FINGERPRINT) -> Path:
    return folder / "plans" / f"{of[:16]}.files"


def kept(folder: Path, of: str = FINGERPRINT) -> Path:
    return folder / "plans" / f"{of[:16]}.heads"


def samples(known: Catalogue, of: str = FINGERPRINT) -> int:
    return known.model(of[:16]).to_json()["samples"]


class TestReading:
    def test_one_model_reads_no_files_of_another(self, many, reads):
        assert samples(Catalogue(list)) == SESSIONS
        assert {path.name.split(".")[1] for path in reads} == {FINGERPRINT[:16]}
        assert len(reads) == SESSIONS

    def test_what_was_recorded_here_is_not_read_after_a_restart(self, many, reads, restart):
        add(session="s1")
        restart()
        assert samples(Catalogue(list)) == SESSIONS + 1
        assert reads == []

    def test_takes_no_longer_than_the_panel_waits_for(self, many, reads, monkeypatch):
        """It is answered with what was read by then, and asks again when it is told of a change."""
        told = []
        with monkeypatch.context() as patch:
            patch.setattr(events, "_listeners", [lambda: told.append(True)])
            patch.setattr(catalogue, "_SECONDS", -1.0)
            status = Catalogue(list).status()
            assert (status["models"], status["reading"], told, reads) == ([], 2, [True], [])
            seconds = iter([1e9, -1.0])  # enough for the first model's files, and no other's
            whole = heads.heads_of
            patch.setattr(
                heads, "heads_of", lambda *of, until, **how: whole(*of, until=next(seconds), **how)
            )
            status = Catalogue(list).status()
            assert (len(status["models"]), status["reading"]) == (1, 1)
            assert len(reads) == SESSIONS
        status = Catalogue(list).status()
        assert (len(status["models"]), status["reading"]) == (2, 0)

    def test_nothing_is_read_twice_nor_after_a_restart(self, many, reads, restart):
        known = Catalogue(list)
        first = known.status()
        assert len(reads) == 2 * SESSIONS
        assert known.status() == first
        assert len(reads) == 2 * SESSIONS
        restart()
        assert Catalogue(list).status() == first
        assert not reads

    def test_after_a_restart_a_status_builds_no_layers(self, many, restart, monkeypatch):
        built, build = [], heads_file._layer
        monkeypatch.setattr(heads_file, "_layer", lambda *of: (built.append(of), build(*of))[1])
        first = Catalogue(list).status()
        before = store.head_of(FINGERPRINT).total
        restart()
        assert Catalogue(list).status() == first
        total = store.head_of(FINGERPRINT).total
        assert not built
        assert (len(total), total.fewest_calls) == (len(before), before.fewest_calls)
        assert list(total) == list(before)
        assert len(built) == len(before)
        for name, layer in before.items():
            assert (layer.output_sum, layer.calls) == (total[name].output_sum, total[name].calls)

    def test_a_sampling_reads_its_own_session_alone(self, many, reads, restart):
        """And the one that was recorded into before ComfyUI ended, if its sums are not kept."""
        Catalogue(list).status()
        for session, others in (("s1", set()), ("recorded", {"s1"}), ("s1", {"recorded"})):
            restart()
            add(session=session)
            assert {path.name.split(".")[2] for path in reads} <= {session, *others}
            reads.clear()
            add(session=session)
            assert not reads
        assert store.head_of(FINGERPRINT).total.samples == SESSIONS + 6

    def test_a_sampling_reads_none_that_changed_while_comfyui_ran(self, folder, reads, restart):
        """The sums of each are kept when they change, and not anew with every sampling."""
        for number in range(SESSIONS):
            add(session=f"s{number}")
        add(session="s1")
        before = kept_files(folder).read_bytes()
        add(session="s1")
        assert kept_files(folder).read_bytes() == before
        restart()
        add(session="s2")
        assert {path.name.split(".")[2] for path in reads} <= {"s1", "s2"}

    def test_at_a_milestone_nobody_waits_for_all_files(self, many, reads, restart, choose):
        choose(Target=32)
        Catalogue(list).status()
        restart()
        add(session="s1", samples=32)
        assert {path.name.split(".")[2] for path in reads} == {"s1"}
        assert store.quantizing_statistics(FINGERPRINT).samples == SESSIONS + 32
        before = milestones._path(FINGERPRINT).read_bytes()
        restart()
        add(session="s1")
        assert {path.suffix for path in reads} == {".pt", ".milestone"}
        assert len(set(reads)) == 2
        assert milestones._path(FINGERPRINT).read_bytes() == before

    def test_a_preview_adds_up_no_files(self, many, reads, restart, choose):
        """Where no milestone is kept yet, as of files that were copied here: a GET writes none."""
        choose(Target=32)
        add(session="s1", samples=32)
        store.quantizing_statistics(FINGERPRINT)
        milestones.forget(FINGERPRINT)
        restart()
        told = preview(Catalogue(list).model(FINGERPRINT[:16]), QuantizeSettings(compensated=True))
        assert len(told["layers"]) == 3
        assert not reads

    def test_a_model_that_is_deleted_at_a_milestone_leaves_nothing(self, many, folder, choose):
        choose(Target=32)
        add(session="s1", samples=32)
        store.remove_statistics(FINGERPRINT)
        assert not [
            path for path in folder.rglob(f"*{FINGERPRINT[:16]}.*") if path.suffix != ".lock"
        ]

    def test_one_that_has_changed_is_read_again(self, many, folder, reads, restart):
        known = Catalogue(list)
        known.status()
        before = kept(folder).read_bytes()
        add(session="s3")
        kept(folder).write_bytes(before)  # as where another ComfyUI recorded
        restart()
        assert samples(Catalogue(list)) == SESSIONS + 1
        assert samples(Catalogue(list), OTHER) == SESSIONS
        assert {path.name.split(".")[2] for path in reads} == {"s3"}

    def test_one_that_is_gone_counts_no_more(self, many, folder, restart):
        assert samples(Catalogue(list)) == SESSIONS
        next(folder.glob(f"*.{FINGERPRINT[:16]}.s3.pt")).unlink()
        assert samples(Catalogue(list)) == SESSIONS - 1
        restart()
        assert samples(Catalogue(list)) == SESSIONS - 1


class TestKept:
    @pytest.mark.parametrize("which", [kept, kept_files])
    def test_is_what_the_files_say(self, many, folder, restart, which):
        Catalogue(list).status()
        for one in {kept(folder), kept_files(folder)} - {which(folder)}:
            one.unlink()
        restart()
        total, head = store.statistics_of(FINGERPRINT), store.head_of(FINGERPRINT)
        assert samples_of(total) == SESSIONS
        assert head.total.meta == total.meta
        assert list(head.total) == list(total)
        for name, layer in total.items():
            bare = head.total[name]
            assert bare.sensitivity == layer.sensitivity
            assert (bare.calls, bare.input_calls) == (layer.calls, layer.input_calls)

    @pytest.mark.parametrize("which", [kept, kept_files])
    def test_where_it_is_damaged_it_is_made_anew(self, many, folder, restart, which):
        expected = Catalogue(list).status()
        whole = which(folder).read_bytes()
        chance = random.Random(0)
        for _ in range(50):
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= chance.randrange(1, 256)
            cut = chance.choice([len(whole), chance.randrange(len(whole))])
            if which is kept_files:
                kept(folder).unlink()
            which(folder).write_bytes(damaged[:cut])
            restart()
            assert Catalogue(list).status() == expected

    @pytest.mark.parametrize(
        "layers",
        [
            '{"layer0": [1]}',
            '{"layer0": [1, 2, "3", 4, 5]}',
            '{"layer0": [1e999, 2, 3, 4, 5]}',
            "7",
        ],
    )
    def test_where_it_is_forged_nobody_gets_a_traceback(self, many, folder, restart, layers):
        """Who may write there may do anything else, too."""
        expected = Catalogue(list).status()
        forged = kept_json.read(kept(folder))
        forged["models"][0]["sums"]["layers"] = layers
        kept_json.write(kept(folder), forged)
        restart()
        with pytest.raises(StatisticsError, match=rf"delete plans/{FINGERPRINT[:16]}\.\*"):
            dict(Catalogue(list).model(FINGERPRINT[:16]).statistics)
        kept(folder).unlink()
        forged = kept_json.read(kept_files(folder))
        next(iter(forged["files"].values()))[1]["layers"] = layers
        kept_json.write(kept_files(folder), forged)
        restart()
        assert Catalogue(list).status() == expected
        assert len(dict(store.head_of(FINGERPRINT).total)) == 3

    def test_is_removed_with_the_model(self, many, folder):
        Catalogue(list).status()
        assert kept(folder).exists()
        store.remove_statistics(FINGERPRINT)
        assert not kept(folder).exists()
        assert kept(folder, OTHER).exists()

    def test_is_not_kept_of_files_that_cannot_be_read(self, many, folder, restart):
        bad = folder / f"toy.{FINGERPRINT[:16]}.bad.pt"
        bad.write_bytes(b"damaged")
        for _ in range(2):
            (problem,) = Catalogue(list).model(FINGERPRINT[:16]).problems
            assert problem.startswith("toy.")
            restart()
        assert not kept(folder).exists()
