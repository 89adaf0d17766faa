"""Fingerprints are read once for each version of a file, and kept on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import folder_paths
import pytest
from harness.modelfiles import an_hour_older, model_file, restart, rewritten
from hswq.loader.files.errors import ModelFileError
from hswq.loader.files.fingerprints import _JUDGES, DAMAGED, fingerprint, known
from hswq.loader.files.model_file import ModelFile
from hswq.loader.files.versions import version_of
from hswq.loader.files.whole_hash import background
from hswq.loader.host.folders import FOLDER

FORGED = "ab" * 32
WHOLE = f'{{"format": 2, "judges": "{_JUDGES}", "files": {{ENTRY}}}}'
"""What is kept, with a forged entry that shows whether it is believed."""


def and_also(entry: str) -> str:
    """Return what is kept with another entry that is none."""
    return WHOLE.replace("ENTRY", f'ENTRY, "/x": {entry}')


@pytest.fixture
def kept(folders: Path) -> Path:
    """Where fingerprints are kept."""
    return folders / "models" / FOLDER / "plans" / "fingerprints.cache"


@pytest.fixture
def path(kept: Path, tmp_path: Path) -> str:
    return model_file(tmp_path / "model.safetensors")


def other_weights(folder: Path) -> bytes:
    """Return a model file of the same size."""
    return Path(model_file(folder / "other" / "model.safetensors", seed=1)).read_bytes()


def files_in(kept: Path) -> dict[str, list]:
    return json.loads(kept.read_text())["files"]


def entry(path: str, of: str = FORGED) -> list:
    return [*version_of(path), of]


def write(kept: Path, path: str, text: str) -> None:
    """Write what is kept, with the forged entry of a model file."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    forged = f"{json.dumps(path)}: {json.dumps(entry(path))}"
    kept.write_bytes(text.replace("ENTRY", forged).encode("latin-1"))


@pytest.fixture(autouse=True)
def unhashed(monkeypatch):
    """No thread reads whole files: it would tell the other weights apart."""
    monkeypatch.setattr(background, "add", lambda _: None)


class TestOnce:
    @pytest.mark.parametrize("again", [lambda: None, restart], ids=["in memory", "after a start"])
    def test_for_each_version(self, path, tmp_path, again):
        before = fingerprint(path)
        assert before == ModelFile(path).read_fingerprint()
        rewritten(path, other_weights(tmp_path))
        again()
        assert fingerprint(path) == known(path) == before != ModelFile(path).read_fingerprint()

    def test_another_process_finds_it(self, path, kept, tmp_path):
        before = fingerprint(path)
        rewritten(path, other_weights(tmp_path))
        script = Path(__file__).parent / "recording_process.py"
        arguments = ["known", str(kept.parents[1]), path]
        done = subprocess.run(
            [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.stdout.split()[-1:] == [before], done.stderr

    @pytest.mark.parametrize("again", [lambda: None, restart], ids=["in memory", "after a start"])
    def test_another_time_or_size_is_another_version(self, path, tmp_path, again):
        before = fingerprint(path)
        rewritten(path, other_weights(tmp_path))
        an_hour_older(path)
        again()
        assert known(path) is None
        second = fingerprint(path)
        assert second == ModelFile(path).read_fingerprint() != before
        rewritten(path, Path(path).read_bytes() + b"\0")
        again()
        assert known(path) is None
        assert fingerprint(path) == second

    def test_a_copy_that_keeps_its_time_is_another_version(self, path, tmp_path):
        before, status = fingerprint(path), os.stat(path)
        other = Path(model_file(tmp_path / "other" / "model.safetensors", seed=1))
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        shutil.copy2(other, path)
        assert os.stat(path).st_mtime_ns == status.st_mtime_ns
        assert os.stat(path).st_size == status.st_size
        assert known(path) is None
        assert fingerprint(path) == fingerprint(str(other)) != before

    def test_a_file_that_changes_is_read_each_time(self, path, kept, tmp_path):
        content = other_weights(tmp_path)
        os.utime(path)
        before = fingerprint(path)
        rewritten(path, content)
        assert known(path) is None
        assert fingerprint(path) == ModelFile(path).read_fingerprint() != before
        assert not kept.exists()

    def test_links_share_what_is_known(self, path, kept, tmp_path):
        """As to a download that has no extension of its own."""
        blob, link = tmp_path / "0123", tmp_path / "link.safetensors"
        os.rename(path, blob)
        link.symlink_to(blob)
        assert fingerprint(str(link)) == known(str(blob))
        assert list(files_in(kept)) == [os.path.realpath(blob)]

    def test_a_file_that_is_gone_is_an_error(self, path):
        fingerprint(path)
        os.unlink(path)
        for ask in (fingerprint, known):
            with pytest.raises(FileNotFoundError):
                ask(path)


class TestDamagedModel:
    def test_is_known_while_the_same_judge_it(self, path, kept):
        """To look at it again takes long, where somebody made it to take long."""
        whole = Path(path).read_bytes()
        rewritten(path, whole[:500])
        with pytest.raises(ModelFileError, match=r"model\.safetensors is truncated"):
            fingerprint(path)
        assert known(path) == DAMAGED
        restart()
        assert known(path) == DAMAGED
        kept.write_text(kept.read_text().replace(_JUDGES, "safetensors of later"))
        restart()
        assert known(path) is None

    def test_is_read_again_when_it_is_to_be_loaded(self, path):
        """It may have been the memory that was short."""
        whole = Path(path).read_bytes()
        rewritten(path, bytes(len(whole)))
        with pytest.raises(ModelFileError):
            fingerprint(path)
        rewritten(path, whole)
        assert known(path) == DAMAGED
        assert fingerprint(path) == known(path) == ModelFile(path).read_fingerprint()


class TestFile:
    def test_is_believed(self, path, kept):
        """Else the tests of damaged ones would show nothing."""
        write(kept, path, WHOLE)
        assert fingerprint(path) == FORGED

    @pytest.mark.parametrize(
        "damaged",
        [
            "", "null", "[" * 200_000, '["format", "files"]', '{"format": 2}',
            '{"format": 2, "files": [1]}', WHOLE[:-3], "\xff" + WHOLE, " " * (16 << 20) + WHOLE,
            WHOLE.replace('"format": 2', '"format": 1'),
            and_also("null"), and_also('"abc"'), and_also("[1, 2]"), and_also("[1, 2, 3, 4, null]"),
            and_also(f'[true, 2, 3, 4, "{FORGED}"]'), and_also(f'[1, 2, 3, 4.5, "{FORGED}"]'),
            and_also(f'[1, 2, 3, 4, "{FORGED}", 5]'), and_also(f'[1, 2, 3, 4, "{FORGED.upper()}"]'),
            and_also(f'[1, 2, 3, 4, "{FORGED[1:]}"]'), and_also(f'[1, 2, 3, 4, "{FORGED}\\n"]'),
        ],
    )  # fmt: skip
    def test_that_is_damaged_is_begun_anew(self, path, kept, damaged):
        write(kept, path, damaged)
        found = fingerprint(path)
        assert found == ModelFile(path).read_fingerprint()
        assert files_in(kept) == {path: entry(path, found)}

    @pytest.mark.parametrize("obstacle", ["a file for the folder", "a folder for the file"])
    def test_that_cannot_be_written_is_no_error(self, path, kept, tmp_path, obstacle):
        if obstacle == "a file for the folder":
            kept.parent.parent.mkdir(parents=True)
            kept.parent.write_text("")
        else:
            kept.mkdir(parents=True)
        before = fingerprint(path)
        rewritten(path, other_weights(tmp_path))
        assert fingerprint(path) == before
        assert not list(kept.parent.glob(".*.tmp"))

    def test_forgets_files_that_are_gone(self, path, kept, tmp_path):
        fingerprint(path)
        renamed = str(tmp_path / "renamed.safetensors")
        os.rename(path, renamed)
        assert known(renamed) is None
        fingerprint(renamed)
        assert list(files_in(kept)) == [renamed]

    def test_keeps_what_others_wrote(self, path, kept, tmp_path):
        fingerprint(path)
        other = model_file(tmp_path / "theirs.safetensors", seed=1)
        write(kept, other, WHOLE)
        third = model_file(tmp_path / "third.safetensors", seed=2)
        fingerprint(third)
        assert set(files_in(kept)) == {path, other, third}

    def test_may_be_deleted(self, path, kept, tmp_path):
        before = fingerprint(path)
        kept.unlink()
        kept.parent.rmdir()
        assert known(path) == before
        restart()
        assert known(path) is None
        assert fingerprint(path) == before
        assert list(files_in(kept)) == [path]

    def test_takes_what_threads_find_at_once(self, kept, tmp_path):
        paths = [model_file(tmp_path / f"{seed}.safetensors", seed) for seed in range(8)]
        threads = [threading.Thread(target=fingerprint, args=[path]) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {path: entry[-1] for path, entry in files_in(kept).items()} == {
            path: ModelFile(path).read_fingerprint() for path in paths
        }

    def test_a_script_without_the_folder_has_none(self, path, kept, tmp_path, monkeypatch):
        monkeypatch.delitem(folder_paths.folder_names_and_paths, FOLDER)
        before = fingerprint(path)
        rewritten(path, other_weights(tmp_path))
        assert fingerprint(path) == before
        assert not kept.exists()
