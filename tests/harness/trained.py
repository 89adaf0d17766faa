"""The trained toy, recorded as a user's ComfyUI records it.

Import it where ComfyUI is up (tests/loader/conftest.py, which has the fixture).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import comfy.sample
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from hswq.loader import store
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.engine.patchers import quantized_layers
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.model_file import ModelFile
from hswq.loader.host.folders import FOLDER
from hswq.loader.jobs import choice
from hswq.loader.recording.recorder import Recorder
from hswq.quant import QuantizeSettings
from toy.checkpoint import make_trained_checkpoint
from toy.drawing import EDGE

STEPS = 20


class Trained(NamedTuple):
    """The trained toy, with what 32 pictures recorded of it."""

    path: str
    patcher: ModelPatcher
    prompt: list


def sample(patcher: ModelPatcher, prompt: list, seed: int, batch: int = 4) -> torch.Tensor:
    latent = torch.zeros(batch, 4, EDGE, EDGE)
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher, comfy.sample.prepare_noise(latent, seed), STEPS, 2.0, "euler", "simple",
            prompt, prompt, latent, disable_pbar=True, seed=seed,
        )  # fmt: skip


@pytest.fixture(scope="session")
def recorded_once(tmp_path_factory: pytest.TempPathFactory):
    """The trained toy and its statistics folder, recorded while stock ComfyUI samples."""
    folder: Path = tmp_path_factory.mktemp("trained")
    path = make_trained_checkpoint(folder / "trained.safetensors")
    with _folders(folder), torch.inference_mode():
        patcher, clip = comfy.sd.load_checkpoint_guess_config(str(path))[:2]
        tokens = clip.tokenize("a red square on white")
        context, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
        prompt = [[context, {"pooled_output": pooled}]]
        recorder = Recorder()
        recorder.install()
        try:
            for seed in range(8):
                sample(patcher, prompt, seed)
        finally:
            recorder.remove()
        store.write_held()
    return Trained(str(path), patcher, prompt), folder


@pytest.fixture(scope="module")
def trained(recorded_once: tuple[Trained, Path], tmp_path_factory: pytest.TempPathFactory):
    """The same for the tests of one file, which may write into its folder."""
    its, recorded = recorded_once
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(recorded / "hswq", folder / "hswq")
    with _folders(folder):
        yield its


@contextmanager
def _folders(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        known = folder_paths.folder_names_and_paths
        patch.setitem(known, FOLDER, ([str(folder / "hswq")], {".pt"}))
        patch.setattr(folder_paths, "user_directory", str(folder / "user"))
        yield


def load(trained: Trained, settings: QuantizeSettings, keep: bool = False) -> ModelPatcher:
    """Load as the node does; `keep` what was rounded for the next load."""
    file = ModelFile(trained.path)
    chosen = choice.choose(choice.AUTO, fingerprint(file), file.name, settings, choice.FAIL)
    patcher = load_checkpoint(file, chosen.decider, only_model=True)[0]
    chosen.keep(patcher.get_attachment(ATTACHMENT))
    if keep:
        chosen.keep_rounded(quantized_layers(patcher))
    return patcher
