"""What is known of models: states, strange files, models in memory."""

from __future__ import annotations

import gc
import json
import math
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from harness.exports import SAMPLES, record
from hswq.calibration import NOISE_LEVELS, LayerStatistics, Statistics, save_statistics
from hswq.loader import store
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.converter import convert
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.host import events
from hswq.loader.host.folders import FOLDER
from hswq.loader.jobs import choice
from hswq.loader.panel import catalogue
from hswq.loader.panel.catalogue import Catalogue, UnknownModelError
from hswq.loader.recording import status
from hswq.loader.recording.status import (
    COMPLETE,
    FAILED,
    NOT_RECORDED,
    QUANTIZED,
    RECORDING,
    ModelStatus,
    StatusTable,
)
from hswq.loader.store import locked_file
from hswq.quant import FP8_PLAIN, BySensitivity, QuantizeSettings, SearchSettings

FINGERPRINT = "ab" * 32
READY = catalogue.READY


def some(samples: int, layers: int = 3, of: int = 3, calls: int = 8, **meta) -> Statistics:
    one = LayerStatistics(8.0, 16.0, calls, torch.ones(4, dtype=torch.float64), calls)
    facts = {"samples": samples, "layers": of, "model": "toy.safetensors"}
    return Statistics({f"layer{n}": one for n in range(layers)}, {**facts, **meta})


def add(samples: int, *arguments, session: str = "recorded", **how) -> None:
    store.add_statistics(
        store.NewSums(some(samples, *arguments, **how), FINGERPRINT, session, "toy.safetensors")
    )


def noted(state: str, reason: str | None = None) -> ModelStatus:
    return ModelStatus("toy.safetensors", FINGERPRINT, state, 0, reason, "2026-01-01T00:00:00")


@pytest.fixture(autouse=True)
def folder(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The statistics folder; who listens in a test does so in it alone."""
    monkeypatch.setattr(events, "_listeners", [])
    return folders / "models" / FOLDER


class TestState:
    @pytest.mark.parametrize(
        ("samples", "layers", "state"),
        [
            (1, 3, RECORDING), (31, 3, RECORDING), (32, 3, READY), (32, 2, RECORDING),
            (255, 3, READY), (256, 3, COMPLETE), (256, 2, RECORDING), (512, 2, COMPLETE),
        ],
    )  # fmt: skip
    def test_by_samples_and_layers(self, samples, layers, state):
        add(samples, layers)
        (model,) = Catalogue(list).models()
        assert model.state() == (state, None)

    @pytest.mark.parametrize(
        ("samples", "last", "state"),
        [
            (31, noted(RECORDING), (RECORDING, None)),
            (31, noted(NOT_RECORDED, "it is compiled"), (NOT_RECORDED, "it is compiled")),
            (32, noted(NOT_RECORDED, "it is compiled"), (NOT_RECORDED, "it is compiled")),
            (32, noted(FAILED, "the disk is full"), (FAILED, "the disk is full")),
            (31, noted(NOT_RECORDED, QUANTIZED), (NOT_RECORDED, QUANTIZED)),
            (32, noted(NOT_RECORDED, QUANTIZED), (READY, None)),
            (256, noted(FAILED, "the disk is full"), (COMPLETE, None)),
        ],
    )
    def test_by_its_last_sampling(self, samples, last, state):
        add(samples)
        (model,) = Catalogue(lambda: [last]).models()
        assert model.state() == state

    def test_without_a_file_it_is_known_by_its_sampling(self):
        found = Catalogue(lambda: [noted(NOT_RECORDED, "it is compiled")]).status()["models"]
        assert [(one["id"], one["samples"], one["sessions"]) for one in found] == [
            (FINGERPRINT[:16], 0, [])
        ]

    def test_the_last_sampled_is_first(self, folder):
        for number in range(3):
            meta = {"fingerprint": f"{number}" * 64, "last_run": f"2026-01-0{number}T00:00:00"}
            folder.mkdir(parents=True, exist_ok=True)
            save_statistics(some(1, **meta), folder / f"x.{str(number) * 16}.recorded.pt")
        found = [model["id"][0] for model in Catalogue(list).status()["models"]]
        assert found == ["2", "1", "0"]

    def test_sampling(self):
        add(1)
        known = Catalogue(list)
        with status.sampling(FINGERPRINT), status.sampling(FINGERPRINT), status.sampling(None):
            assert known.status()["models"][0]["sampling"]
        assert not known.status()["models"][0]["sampling"]


class TestMissing:
    """What the panel says, and the loader's line."""

    @pytest.mark.parametrize(
        ("facts", "told", "line"),
        [
            ({"calls": 3}, {"what": "calls", "has": 3, "needs": 8}, "3 of 8 calls of a layer"),
            (
                {NOISE_LEVELS: "9 9 0 0 0 0 0 0"},
                {"what": "noise", "has": 2, "needs": 4},
                "2 of 4 noise levels",
            ),
            ({"layers": 2}, {"what": "layers", "has": 2, "needs": 3}, "2 of 3 layers"),
        ],
    )
    def test_is_told(self, facts, told, line):
        add(40, **facts)
        (model,) = Catalogue(list).models()
        assert model.to_json()["missing"] == told
        assert model.state() == (RECORDING, None)
        asked = choice.AUTO, FINGERPRINT, "toy", QuantizeSettings(), choice.KEEP_16_BIT
        assert choice.choose(*asked).about.startswith(f"16 bit for now: {line} recorded")

    def test_is_nothing_once_it_is_ready(self):
        add(40)
        assert Catalogue(list).models()[0].to_json()["missing"] is None


class TestFiles:
    def test_sessions_add_up(self):
        add(40)
        add(2, session="mine")
        model = Catalogue(list).model(FINGERPRINT[:16]).to_json()
        assert model["samples"] == 42
        assert [(one["session"], one["samples"]) for one in model["sessions"]] == [
            ("mine", 2), ("recorded", 40),
        ]  # fmt: skip

    def test_a_changed_file_is_read_again_and_a_deleted_one_forgotten(self, folder):
        known = Catalogue(list)
        add(1)
        assert known.models()[0].statistics.samples == 1
        add(1)
        assert known.models()[0].statistics.samples == 2
        next(folder.glob("*.pt")).unlink()
        assert known.models() == []
        with pytest.raises(UnknownModelError, match="there is no model abab"):
            known.model(FINGERPRINT[:16])

    def test_what_is_no_statistics_file_is_left_out(self, folder, caplog):
        add(1)
        short = FINGERPRINT[:16]
        (folder / f"x.{short}.damaged.pt").write_bytes(b"damaged")
        (folder / f"x.{'0' * 16}.other.pt").write_bytes(next(folder.glob("toy*.pt")).read_bytes())
        (folder / "mine.pt").write_bytes(b"")
        (folder / f"x.{short}.folder.pt").mkdir()
        save_statistics(some(1), folder / f"x.{short}.unknown.pt")
        known = Catalogue(list)
        for _ in range(2):
            assert [model.statistics.samples for model in known.models()] == [1]
        damaged = [record for record in caplog.records if "damaged.pt" in record.message]
        assert len(damaged) == 1

    def test_strange_meta_gives_json_all_the_same(self, folder):
        folder.mkdir(parents=True)
        meta = {
            "fingerprint": FINGERPRINT, "model": "x" * 100_000, "last_run": math.nan,
            "layers": -5, "session": 5, "created_at": True, "recording": 1.5,
        }  # fmt: skip
        save_statistics(some(2**53, **meta), folder / f"x.{FINGERPRINT[:16]}.recorded.pt")
        text = json.dumps(Catalogue(list).status(), allow_nan=False)
        assert len(text) < 2000
        (model,) = json.loads(text)["models"]
        assert (model["total_layers"], model["last_run"]) == (3, None)

    def test_holds_no_importances(self):
        add(1)
        (model,) = Catalogue(list).models()
        assert {layer.importance_sum.numel() for layer in model.statistics.values()} == {0}


class TestRemove:
    def test_waits_for_who_writes_and_says_so_when_it_takes_too_long(self, folder, monkeypatch):
        add(1)
        (path,) = folder.glob("*.pt")
        monkeypatch.setattr(locked_file, "_LOCK_SECONDS", 0.1)
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with locked_file.locked(path):
                held.set()
                done.wait(10)

        other = threading.Thread(target=hold)
        other.start()
        held.wait(10)
        try:
            with pytest.raises(OSError, match=f"keeps {path.name} locked: try again later"):
                store.remove_statistics(FINGERPRINT)
            assert path.exists()
        finally:
            done.set()
            other.join()
        assert store.remove_statistics(FINGERPRINT) == 1
        assert not path.exists()

    def test_takes_what_was_set_aside(self, folder):
        add(1)
        (path,) = folder.glob("*.pt")
        path.write_bytes(b"damaged")
        add(1)
        assert len(list(folder.glob("*.damaged"))) == 1
        store.remove_statistics(FINGERPRINT)
        assert {one.suffix for one in folder.iterdir()} == {".lock"}

    def test_leaves_other_models_and_sessions(self):
        add(1)
        add(2, session="mine")
        store.add_statistics(store.NewSums(some(3), "cd" * 32, "recorded", "other.safetensors"))
        assert store.remove_statistics(FINGERPRINT, "recorded") == 1
        assert store.statistics_of(FINGERPRINT).samples == 2
        assert store.statistics_of("cd" * 32).samples == 3


class TestAlive:
    @pytest.fixture
    def path(self, checkpoint, statistics) -> str:
        record(str(checkpoint), statistics)
        return str(checkpoint)

    def loaded(self) -> dict | None:
        """Return what is told of the toy; other tests may have one in memory."""
        (model,) = Catalogue(list).status()["models"]
        told = model["loaded"]
        return told and {**told, "outcome": told["outcome"]["samples"]}

    def test_as_long_as_it_lives(self, path, planner):
        told, before = [], self.loaded()
        events.on_change(lambda: told.append(time.monotonic()))
        patcher = load_checkpoint(path, planner(0.5), only_model=True)[0]
        clone = patcher.clone()
        assert self.loaded() == {"mode": "scaled", "keep_ratio": 0.5, "outcome": 0}
        gone = weakref.ref(patcher.model)
        del patcher
        gc.collect()
        assert self.loaded() != before
        told.clear()
        del clone
        gc.collect()
        assert gone() is None
        assert told
        assert self.loaded() == before

    def test_says_what_its_plan_was_made_from(self, path, statistics):
        settings = QuantizeSettings(FP8_PLAIN, BySensitivity(1.0), SearchSettings(64, 10, 1))
        chosen = choice.choose(choice.AUTO, fingerprint(path), "toy", settings, choice.FAIL)
        patcher = load_checkpoint(path, chosen.decider, only_model=True)[0]
        assert patcher.get_attachment(ATTACHMENT).samples == SAMPLES
        assert self.loaded() == {"mode": "compatible", "keep_ratio": 1.0, "outcome": SAMPLES}

    def test_of_the_converter_too(self, path, models):
        plan = models.quantized.get_attachment(ATTACHMENT)
        converted = convert(models.sixteen_bit, plan)
        assert self.loaded() == {"mode": "scaled", "keep_ratio": 0.25, "outcome": 0}
        assert converted.model is not None


class TestTable:
    def test_tells_and_forgets(self):
        told, table = [], StatusTable()
        events.on_change(lambda: told.append(table.all()))
        table.note(noted(RECORDING))
        assert [one.fingerprint for one in told[-1]] == [FINGERPRINT]
        table.forget(FINGERPRINT)
        table.forget("unknown")
        assert table.all() == []
