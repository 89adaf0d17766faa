"""A black picture of a file that only our loaders read is explained where the user looks."""

from __future__ import annotations

import logging

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness.exports import wanted, written
from harness.inprocess import sample
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.files.layer_formats import FILE_FORMATS, only_ours
from hswq.loader.files.model_file import ModelFile
from hswq.loader.recording.status import FAILED
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("folders")


def black(patcher: ModelPatcher) -> ModelPatcher:
    """Return a clone whose results are not finite, as those of wrong weights in FP16 are."""

    def nothing(apply_model, args):
        return float("nan") * apply_model(args["input"], args["timestep"], **args["c"])

    clone = patcher.clone()
    clone.set_model_unet_function_wrapper(nothing)
    return clone


def by_stock(path) -> ModelPatcher:
    return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]


@pytest.mark.parametrize("kind", FILE_FORMATS)
def test_names_the_format_of_the_file(recorder, recorded, kind, caplog):
    path, _ = written(recorded, wanted(kind))
    assert only_ours(ModelFile(path).own) == (kind if FILE_FORMATS[kind].only_ours else None)
    sample(black(by_stock(path)))
    status = recorder.status()[-1]
    if FILE_FORMATS[kind].only_ours:
        reason = f"its file is in the format {kind}, which only HSWQ reads"
        assert (status.name, status.state, status.reason) == (path.name, FAILED, reason)
        assert reason in caplog.text
    else:
        assert "only HSWQ" not in (status.reason or "")


def test_is_not_said_of_our_loaders_nor_of_other_files(recorder, recorded):
    path, _ = written(recorded, wanted("original V2"))
    ours = load_checkpoint(str(path), None, only_model=True)[0]
    for model in (ours, black(ours), by_stock(recorded), black(by_stock(recorded))):
        sample(model)
        assert "only HSWQ" not in (recorder.status()[-1].reason or "")


def test_reads_no_checkpoint_whole_for_it(recorder, recorded, tmp_path, caplog):
    path = tmp_path / "toy.ckpt"
    torch.save(load_file(recorded), path)
    patcher = black(by_stock(path))
    path.unlink()
    with caplog.at_level(logging.INFO):
        sample(patcher)
    assert "could not be explained" not in caplog.text
