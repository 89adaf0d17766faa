"""A model's file is found by its weights, with as little reading as can be."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
import pytest
import torch
from harness.modelfiles import an_hour_older, model_file, restart, rewritten
from hswq.loader.files.fingerprints import fingerprint, known
from hswq.loader.files.model_file import ModelFile
from hswq.loader.jobs.model_files import find_source


@pytest.fixture
def models(folders: Path) -> Path:
    """The checkpoints folder."""
    (folders / "output" / "diffusion_models").mkdir(parents=True)
    return folders / "output" / "checkpoints"


@pytest.fixture
def wanted(models: Path) -> str:
    """The fingerprint of mine.safetensors, which nothing is known of."""
    model_file(models / "another.safetensors", seed=1)
    return ModelFile(model_file(models / "mine.safetensors")).read_fingerprint()


class TestFindSource:
    def test_by_its_name_without_reading_others(self, models, wanted):
        assert find_source(wanted, "mine.safetensors") == "checkpoints/mine.safetensors"
        assert known(str(models / "another.safetensors")) is None
        assert find_source(wanted, "no name") == "checkpoints/mine.safetensors"

    def test_renamed_and_moved(self, models, wanted):
        fingerprint(str(models / "mine.safetensors"))
        moved = models.parent / "diffusion_models" / "renamed.safetensors"
        (models / "mine.safetensors").rename(moved)
        source = "diffusion_models/renamed.safetensors"
        assert find_source(wanted, "mine.safetensors") == source
        restart()
        assert known(str(moved)) == wanted

    @pytest.mark.parametrize("again", [lambda: None, restart], ids=["in memory", "after a start"])
    def test_what_is_known_comes_before_what_would_have_to_be_read(self, models, wanted, again):
        fingerprint(str(models / "mine.safetensors"))
        copy = model_file(models / "a copy.safetensors")
        again()
        for name in ("a copy.safetensors", "no name"):
            assert find_source(wanted, name) == "checkpoints/mine.safetensors"
        assert known(copy) is known(str(models / "another.safetensors")) is None

    def test_of_a_file_under_its_name_that_has_other_weights_now(self, models, wanted):
        (models / "mine.safetensors").rename(models / "renamed.safetensors")
        model_file(models / "mine.safetensors", seed=2)
        assert find_source(wanted, "mine.safetensors") == "checkpoints/renamed.safetensors"

    def test_that_is_gone(self, models, wanted):
        (models / "mine.safetensors").unlink()
        (models / "gone.safetensors").symlink_to(models / "mine.safetensors")
        assert find_source(wanted, "mine.safetensors") is None
        assert known(str(models / "another.safetensors")) is not None

    def test_a_damaged_file_is_read_once(self, models, wanted):
        path = str(models / "mine.safetensors")
        whole = Path(path).read_bytes()
        rewritten(path, bytes(len(whole)))
        assert find_source(wanted, "mine.safetensors") is None
        rewritten(path, whole)
        assert find_source(wanted, "mine.safetensors") is None
        an_hour_older(path)
        assert find_source(wanted, "mine.safetensors") == "checkpoints/mine.safetensors"

    def test_a_ckpt_is_read_by_its_name_alone(self, models, wanted):
        folder_paths.folder_names_and_paths["checkpoints"][1].add(".ckpt")
        tensors = ModelFile(str(models / "mine.safetensors")).tensors
        ckpt = models / "mine.ckpt"
        torch.save({"state_dict": tensors}, ckpt)
        an_hour_older(ckpt)
        del tensors
        os.unlink(models / "mine.safetensors")
        assert find_source(wanted, "mine") is None
        assert find_source(wanted, "mine.ckpt") == "checkpoints/mine.ckpt"
        assert find_source(wanted, "mine") == "checkpoints/mine.ckpt"
