"""Whose weights a model has: known when it is first seen, whatever becomes of its file then."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfy_extras.nodes_model_merging import ModelMergeSimple
from harness.foreign import load_foreign
from harness.inprocess import load, load_16_bit, patched, sample
from harness.patches import patch_file
from harness.recording import recorded
from hswq.calibration import load_statistics
from hswq.loader.engine import loading
from hswq.loader.engine.identity import identity
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.nodes.calibration import HSWQCalibration
from hswq.loader.recording.status import NOT_RECORDED, QUANTIZED
from toy.checkpoint import make_checkpoint


@pytest.fixture
def own(checkpoint, tmp_path) -> Path:
    """A checkpoint of the test's own."""
    return Path(shutil.copy(checkpoint, tmp_path / "own.safetensors"))


@pytest.fixture(scope="module")
def finetune(tmp_path_factory) -> Path:
    """A checkpoint with other weights."""
    return make_checkpoint(tmp_path_factory.mktemp("finetune") / "finetune.safetensors", seed=1)


def overwrite(path: Path, source: Path) -> None:
    """As a download does, which a model in memory does not see."""
    new = path.with_name("new")
    shutil.copy(source, new)
    os.replace(new, path)


class TestOfAFile:
    def test_is_the_files(self, model, checkpoint):
        found = identity(model)
        assert found.is_of_file
        assert (found.path, found.name) == (str(checkpoint), checkpoint.name)
        assert found.fingerprint == fingerprint(str(checkpoint))
        assert identity(model.clone()) is found

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_stored_in_another_dtype(self, tmp_path, dtype):
        path = make_checkpoint(tmp_path / "toy.safetensors", dtype=dtype)
        assert identity(load_16_bit(path)).fingerprint == fingerprint(str(path))

    def test_with_a_lora_loaded(self, own):
        model = load_16_bit(own)
        load(patched(model, patch_file("LoRA", every=1)))
        assert identity(model).is_of_file

    def test_is_taken_from_our_loader(self, own, finetune, planner):
        model = loading.load_checkpoint(str(own), planner(), only_model=True)[0]
        before = fingerprint(str(own))
        overwrite(own, finetune)
        assert identity(model).fingerprint == before


class TestOfAnotherLoader:
    """Whose weights are of a class of its own, as GGUF's."""

    def test_is_that_of_its_bytes(self, checkpoint, finetune):
        found = [
            identity(load_foreign(path, packed=True)) for path in (checkpoint, checkpoint, finetune)
        ]
        assert not any(one.is_of_file for one in found)
        assert found[0] == found[1]
        assert found[0].fingerprint != found[2].fingerprint

    def test_is_not_recorded(self, checkpoint, recorder):
        sample(load_foreign(checkpoint, packed=True))
        assert recorder.status()[0].reason == QUANTIZED
        assert recorded(checkpoint) is None


class TestOverwritten:
    def test_before_the_first_sampling(self, own, finetune, recorder):
        model = load_16_bit(own)
        overwrite(own, finetune)
        sample(model)
        assert recorded(own) is None
        status = recorder.status()[-1]
        assert (status.state, status.reason) == (
            NOT_RECORDED, "its weights are not those of its file",
        )  # fmt: skip

    def test_after_it(self, own, finetune, checkpoint, recorder):
        model = load_16_bit(own)
        sample(model)
        overwrite(own, finetune)
        sample(model)
        assert recorded(own) is None
        assert recorded(checkpoint).samples == 2

    def test_by_what_is_no_model(self, own, recorder):
        model = load_16_bit(own)
        new = own.with_name("new")
        new.write_bytes(b"damaged")
        os.replace(new, own)
        sample(model)
        assert "not those of its file" in recorder.status()[-1].reason


@pytest.fixture(autouse=True)
def hidden(monkeypatch):
    """What ComfyUI gives to the node."""
    monkeypatch.setattr(HSWQCalibration, "hidden", SimpleNamespace(unique_id=None))


def calibrate(patcher, session: str = "mine"):
    """Sample through the calibration node."""
    return sample(HSWQCalibration.execute(patcher, session).result[0])


@pytest.fixture
def merges(checkpoint, finetune) -> list:
    """Two of the same models."""
    one, other = load_16_bit(checkpoint), load_16_bit(finetune)
    return [ModelMergeSimple().merge(one, other, ratio)[0] for ratio in (0.3, 0.7)]


class TestMerge:
    def test_is_the_same_when_made_again(self, merges, checkpoint, finetune):
        again = ModelMergeSimple().merge(load_16_bit(checkpoint), load_16_bit(finetune), 0.3)[0]
        first, second = map(identity, merges)
        assert identity(again).fingerprint == first.fingerprint != second.fingerprint
        assert identity(merges[0].clone()).fingerprint == first.fingerprint

    def test_is_the_same_with_a_lora(self, merges):
        merge = merges[0]
        assert identity(patched(merge, patch_file("LoRA"))) == identity(merge)

    def test_two_do_not_add_up(self, merges, folder):
        for merge in (*merges, merges[0]):
            calibrate(merge)
        found = {one.fingerprint: one.samples for one in map(load_statistics, folder.glob("*.pt"))}
        first, second = (identity(merge).fingerprint for merge in merges)
        assert found == {first: 2, second: 1}

    def test_nor_do_models_of_no_file(self, checkpoint, finetune, folder):
        for path in (checkpoint, finetune):
            model = load_16_bit(path)
            model.cached_patcher_init = None
            calibrate(model)
        found = [load_statistics(path) for path in folder.glob("*.pt")]
        assert [one.samples for one in found] == [1, 1]
        assert len({one.fingerprint for one in found}) == 2


def test_calibration_refuses_what_was_overwritten(own, finetune, folder):
    model = load_16_bit(own)
    overwrite(own, finetune)
    with pytest.raises(ValueError, match="not those of its file"):
        calibrate(model)
