"""What files hold is read once, kept on disk, and never read for another model's sake."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness.sums import FINGERPRINT, delta, samples_of
from hswq import calibration
from hswq.loader import store
from hswq.loader.host import events
from hswq.loader.panel import catalogue
from hswq.loader.panel.catalogue import Catalogue
from hswq.loader.store import heads, heads_file, locked_file

OTHER = "cd" * 32
SESSIONS = 8  # more than are kept in memory whole


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Notes which statistics files are read."""
    found = []

    def noted(path):
        found.append(path)
        return calibration.load_statistics(path)

    for module in (heads, locked_file):
        monkeypatch.setattr(module, "load_statistics", noted)
    return found


@pytest.fixture
def restart(reads: list[Path]):
    """Forgets what is in memory, and what was read before."""

    def forget() -> None:
        for cache in (heads._known, heads._files, locked_file._cache):
            cache.clear()
        reads.clear()

    return forget


def add(of: str = FINGERPRINT, session: str = "recorded"):
    return store.add_statistics(store.NewSums(delta(), of, session, "toy.safetensors"))


@pytest.fixture
def many(folder: Path, restart) -> None:
    """Two models of many sessions, copied here while ComfyUI did not run."""
    for of in (FINGERPRINT, OTHER):
        for number in range(SESSIONS):
            add(of, f"s{number}")
        kept(folder, of).unlink()
    restart()


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
        Catalogue(list).status()
        restart()
        add()
        assert {path.name.split(".")[2] for path in reads} == {f"s{n}" for n in range(SESSIONS)}
        reads.clear()
        add()
        assert store.head_of(FINGERPRINT).total.samples == SESSIONS + 2
        assert not reads

    def test_one_that_has_changed_is_read_again(self, many, folder, reads, restart):
        known = Catalogue(list)
        known.status()
        before = kept(folder).read_bytes()
        add(session="s3")
        kept(folder).write_bytes(before)  # as where another ComfyUI recorded
        restart()
        assert samples(Catalogue(list)) == SESSIONS + 1
        assert len(reads) == SESSIONS
        assert samples(Catalogue(list), OTHER) == SESSIONS
        assert len(reads) == SESSIONS

    def test_one_that_is_gone_counts_no_more(self, many, folder, restart):
        assert samples(Catalogue(list)) == SESSIONS
        next(folder.glob(f"*.{FINGERPRINT[:16]}.s3.pt")).unlink()
        assert samples(Catalogue(list)) == SESSIONS - 1
        restart()
        assert samples(Catalogue(list)) == SESSIONS - 1


class TestKept:
    def test_is_what_the_files_say(self, many, restart):
        Catalogue(list).status()
        restart()
        total, head = store.statistics_of(FINGERPRINT), store.head_of(FINGERPRINT)
        assert samples_of(total) == SESSIONS
        assert head.total.meta == total.meta
        assert list(head.total) == list(total)
        for name, layer in total.items():
            bare = head.total[name]
            assert bare.sensitivity == layer.sensitivity
            assert (bare.calls, bare.input_calls) == (layer.calls, layer.input_calls)

    def test_where_it_is_damaged_it_is_made_anew(self, many, folder, restart):
        expected = Catalogue(list).status()
        whole = kept(folder).read_bytes()
        chance = random.Random(0)
        for _ in range(50):
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= chance.randrange(1, 256)
            cut = chance.choice([len(whole), chance.randrange(len(whole))])
            kept(folder).write_bytes(damaged[:cut])
            restart()
            assert Catalogue(list).status() == expected

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
