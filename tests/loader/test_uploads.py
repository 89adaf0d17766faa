"""Statistics files that somebody sends: counted once, and not at all where they are no good."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import comfy.model_management
import pytest
import torch
from hswq.calibration import (
    LayerStatistics,
    Statistics,
    StatisticsError,
    load_statistics,
    save_statistics,
)
from hswq.loader import store
from hswq.loader.engine import ahead
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.host.folders import FOLDER
from hswq.loader.panel.uploads import take_in

FINGERPRINT = "ab" * 32
NAME = "theirs.pt"


@pytest.fixture(autouse=True)
def folder(folders: Path) -> Path:
    return folders / "models" / FOLDER


def statistics(samples: int, channels: int = 4, count: int = 3, **meta) -> Statistics:
    importance = torch.full((channels,), float(samples), dtype=torch.float64)
    one = LayerStatistics(1.0, 2.0 * samples, samples, importance, samples)
    facts = {"samples": samples, "model": "toy.safetensors", "fingerprint": FINGERPRINT}
    return Statistics({f"layer{n}": one for n in range(count)}, {**facts, **meta})


def content(tmp_path: Path, found: Statistics) -> bytes:
    path = tmp_path / "sent.pt"
    save_statistics(found, path)
    return path.read_bytes()


def recorded(number: int) -> dict:
    """Return the meta of a recording."""
    return {"recording": f"{number:016x}", "session": "recorded"}


def total() -> int:
    found = store.statistics_of(FINGERPRINT)
    return 0 if found is None else found.samples


class TestPreparing:
    @pytest.mark.parametrize("usual", [torch.bfloat16, torch.float8_e4m3fn])
    def test_the_gpu_is_ready_for_who_has_recorded_nothing(self, tmp_path, monkeypatch, usual):
        asked = []
        monkeypatch.setattr(ahead, "prepare", lambda *what: asked.append(what))
        monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda *_: usual)
        take_in(content(tmp_path, statistics(2, **recorded(1))), NAME)
        dtype = torch.bfloat16 if usual is torch.bfloat16 else torch.float16
        assert asked == [(comfy.model_management.get_torch_device(), dtype)]


class TestCounting:
    def test_a_new_one_is_a_session_of_its_own(self, tmp_path, folder):
        store.add_statistics(
            store.NewSums(statistics(5), FINGERPRINT, "recorded", "toy.safetensors")
        )
        its = take_in(content(tmp_path, statistics(2, **recorded(1))), NAME)
        assert its == FINGERPRINT
        assert total() == 7
        names = sorted(path.name for path in folder.glob("*.pt"))
        assert len(names) == 2
        assert names[0].startswith(f"toy.{FINGERPRINT[:16]}.recorded-")
        found = load_statistics(folder / names[0])
        assert dict(found.items())["layer0"].importance_sum.tolist() == [2.0] * 4

    def test_the_same_twice_counts_once(self, tmp_path, folder):
        sent = content(tmp_path, statistics(2, **recorded(1)))
        take_in(sent, NAME)
        before = {path: path.read_bytes() for path in folder.glob("*.pt")}
        take_in(sent, "other name.pt")
        assert {path: path.read_bytes() for path in folder.glob("*.pt")} == before
        assert total() == 2

    def test_of_one_recording_the_largest_counts(self, tmp_path, folder):
        for samples, expected in ((5, 5), (3, 5), (9, 9), (5, 9)):
            take_in(content(tmp_path, statistics(samples, **recorded(1))), NAME)
            assert total() == expected
        assert len(list(folder.glob("*.pt"))) == 1

    def test_ones_own_of_before_counts_once_while_it_grows_on(self, tmp_path, folder):
        store.add_statistics(
            store.NewSums(statistics(5), FINGERPRINT, "recorded", "toy.safetensors")
        )
        sent = next(folder.glob("*.pt")).read_bytes()
        take_in(sent, NAME)
        store.add_statistics(
            store.NewSums(statistics(1), FINGERPRINT, "recorded", "toy.safetensors")
        )
        take_in(sent, NAME)
        assert total() == 6
        store.remove_statistics(FINGERPRINT)
        take_in(sent, NAME)
        assert total() == 5

    def test_files_of_workers_add_up(self, tmp_path):
        """Begun in the same second, under the same session."""
        for number in range(4):
            meta = {**recorded(number), "created_at": "2026-01-01T00:00:00+00:00"}
            take_in(content(tmp_path, statistics(10 + number, **meta)), NAME)
        assert total() == 46

    def test_without_ids_the_content_tells(self, tmp_path):
        for samples in (2, 2, 3):
            take_in(content(tmp_path, statistics(samples)), NAME)
        assert total() == 5

    def test_what_is_recorded_on_is_not_theirs(self, tmp_path):
        """Their file, grown on elsewhere, must not replace what was recorded here."""
        take_in(content(tmp_path, statistics(5, **recorded(1))), NAME)
        store.add_statistics(
            store.NewSums(statistics(2), FINGERPRINT, "recorded", "toy.safetensors")
        )
        take_in(content(tmp_path, statistics(8, **recorded(1))), NAME)
        assert total() == 10

    def test_what_was_recorded_here_is_never_displaced(self, tmp_path, folder):
        """By somebody who saw its id."""
        mine = store.add_statistics(
            store.NewSums(statistics(5, layers=3), FINGERPRINT, "recorded", "toy")
        )
        forged = {"recording": mine.meta["recording"], "session": "recorded", "layers": 4096}
        take_in(content(tmp_path, statistics(4000, **forged)), NAME)
        assert total() == 5
        assert store.statistics_of(FINGERPRINT).meta["layers"] == 3
        take_in(content(tmp_path, statistics(7, **recorded(1), layers=4096)), NAME)
        assert total() == 12
        assert store.statistics_of(FINGERPRINT).meta["layers"] == 3


class TestMeta:
    def test_only_what_is_ours_is_kept(self, tmp_path, folder):
        meta = {
            "model": "../../" + "x" * 5000, "session": "../evil", "recording": "not hex",
            "merged": "x" * 5000, "created_at": "<script>", "last_run": "2026-01-01T00:00:00+00:00",
            "layers": 3, "other": "x" * 100_000, "lora": "y",
        }  # fmt: skip
        sent = content(tmp_path, statistics(2, **meta))
        take_in(sent, NAME)
        (path,) = folder.glob("*.pt")
        assert path.parent == folder
        assert ".uploaded-" in path.name
        found = dict(load_statistics(path).meta)
        assert found.pop("created_at")[:4] in ("2026", found["last_run"][:4])
        assert len(found.pop("model")) == 200
        assert found.pop("session").startswith("uploaded-")
        assert found == {
            "samples": 2, "layers": 3, "last_run": "2026-01-01T00:00:00+00:00", "total_steps": 0,
            "merged": hashlib.sha256(sent).hexdigest()[:16], "fingerprint": FINGERPRINT,
            "sent": True,
        }  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize(
        ("found", "problem"),
        [
            (statistics(2, fingerprint=None), "does not say which weights it is of"),
            (statistics(2, fingerprint="../" * 22), "does not say which weights it is of"),
            (statistics(2, fingerprint="AB" * 32), "does not say which weights it is of"),
            (statistics(2, count=0), "holds no statistics of any layer"),
        ],
    )
    def test_without_a_model_or_layers(self, tmp_path, folder, found, problem):
        meta = {key: value for key, value in found.meta.items() if value is not None}
        with pytest.raises(StatisticsError, match=f"{NAME} {problem}"):
            take_in(content(tmp_path, Statistics(found, meta)), NAME)
        assert not folder.exists()

    def test_of_other_channels_than_those_that_are_there(self, tmp_path, folder):
        take_in(content(tmp_path, statistics(2, **recorded(1))), NAME)
        with pytest.raises(ValueError, match="layer 'layer0': cannot add statistics of"):
            take_in(content(tmp_path, statistics(2, channels=5, **recorded(2))), NAME)
        assert total() == 2

    def test_of_layers_that_the_file_has_not(self, tmp_path, folders, folder, checkpoint):
        link = folders / "output" / "checkpoints" / "toy.safetensors"
        link.parent.mkdir(parents=True)
        link.symlink_to(checkpoint)
        forged = statistics(2, fingerprint=fingerprint(str(link)))
        forged = Statistics({"time_embed.0": forged["layer0"], **forged}, forged.meta)
        message = f"{NAME} has a layer 'layer0', which is not in checkpoints/toy.safetensors"
        with pytest.raises(ValueError, match=message):
            take_in(content(tmp_path, forged), NAME)
        assert not list(folder.glob("*.pt"))
        own = Statistics({"input_blocks.0.0": forged["layer0"]}, {**forged.meta, "layers": 4000})
        with pytest.raises(ValueError, match=f"{NAME} says 4000 layers, and checkpoints/toy"):
            take_in(content(tmp_path, own), NAME)
        assert not list(folder.glob("*.pt"))

    @pytest.mark.parametrize(
        "name",
        ["", ".", "..", "../x", "a/b", "a\\b", ".x", "-x", "x\0", "x\n", "x" * 201, "é" * 101],
    )
    def test_names(self, tmp_path, folder, name):
        with pytest.raises(ValueError, match="the file's name must be a plain one"):
            take_in(content(tmp_path, statistics(2)), name)
        assert not folder.exists()

    def test_what_is_no_statistics_file(self, folder):
        other = io.BytesIO()
        torch.save({"weights": torch.ones(3)}, other)
        for sent in (b"", b"noise", other.getvalue()):
            with pytest.raises(StatisticsError, match=NAME):
                take_in(sent, NAME)
        assert not folder.exists()
