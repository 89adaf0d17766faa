"""Whatever way a workflow samples, it is recorded: every sampling node and guider of ComfyUI."""

from __future__ import annotations

from pathlib import Path

import comfy.samplers
import folder_paths
import nodes
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from harness.inprocess import LATENT, conditioning
from hswq.calibration import monitored_layers
from hswq.loader import store
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.host.folders import FOLDER
from hswq.loader.recording.recorder import Recorder


@pytest.fixture(autouse=True)
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A recorder of the test's own, which measures every layer in every forward."""
    folders = folder_paths.folder_names_and_paths
    monkeypatch.setitem(folders, FOLDER, ([str(tmp_path / "hswq")], {".pt"}))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    path = tmp_path / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"HSWQ.Budget": 100}')
    own = comfy.samplers.CFGGuider.outer_sample
    recorder = Recorder()
    recorder.install()
    yield recorder
    comfy.samplers.CFGGuider.outer_sample = own


def latent(batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, *LATENT[1:])}


def ksampler(model, sampler: str = "euler") -> None:
    prompts = (conditioning(1), conditioning(2))
    nodes.KSampler().sample(model, 0, 2, 5.0, sampler, "normal", *prompts, latent())


def ksampler_advanced(model) -> None:
    prompts = (conditioning(1), conditioning(2))
    nodes.KSamplerAdvanced().sample(
        model, "enable", 0, 4, 5.0, "euler", "normal", *prompts, latent(), 1, 3, "disable"
    )


def sampler_custom(model) -> None:
    prompts = (conditioning(1), conditioning(2))
    custom.SamplerCustom.execute(model, True, 0, 5.0, *prompts, *_sampler(model), latent())


def _sampler(model) -> tuple:
    sigmas = custom.BasicScheduler.execute(model, "karras", 2, 1.0).result[0]
    return comfy.samplers.sampler_object("euler"), sigmas


def _advanced(model, guider) -> None:
    noise = custom.RandomNoise.execute(0).result[0]
    custom.SamplerCustomAdvanced.execute(noise, guider, *_sampler(model), latent())


def basic_guider(model) -> None:
    _advanced(model, custom.BasicGuider.execute(model, conditioning(1)).result[0])


def cfg_guider(model) -> None:
    prompts = (conditioning(1), conditioning(2))
    _advanced(model, custom.CFGGuider.execute(model, *prompts, 5.0).result[0])


def dual_cfg_guider(model) -> None:
    prompts = [conditioning(seed) for seed in (1, 2, 3)]
    _advanced(model, custom.DualCFGGuider.execute(model, *prompts, 5.0, 3.0, "regular").result[0])


WAYS = {
    function.__name__: function
    for function in (
        ksampler, ksampler_advanced, sampler_custom, basic_guider, cfg_guider, dual_cfg_guider
    )
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_is_recorded(models, checkpoint, way):
    WAYS[way](models.sixteen_bit)
    found = store.statistics_of(fingerprint(str(checkpoint)))
    assert found.samples == 1
    assert found.keys() == monitored_layers(models.sixteen_bit.model.diffusion_model).keys()
    modules = models.sixteen_bit.model.diffusion_model.modules()
    assert not any(module._forward_hooks for module in modules)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "heun", "uni_pc", "ddim", "lcm"])
def test_by_every_sampler(models, checkpoint, sampler):
    ksampler(models.sixteen_bit, sampler)
    assert store.statistics_of(fingerprint(str(checkpoint))).samples == 1


@pytest.mark.parametrize("way", WAYS)
def test_is_not_recorded_when_quantized(models, checkpoint, way, recorder):
    WAYS[way](models.quantized)
    assert store.statistics_of(fingerprint(str(checkpoint))) is None
    assert "quantized" in recorder.status()[-1].reason


def test_passes_every_argument_and_the_result_through(models, recorder):
    seen = {}

    class Guider(comfy.samplers.CFGGuider):
        def inner_sample(self, noise, latent_image, device, sampler, sigmas, denoise_mask,
                         callback, disable_pbar, seed, **more):  # fmt: skip
            seen.update(mask=denoise_mask, callback=callback, bar=disable_pbar, seed=seed, **more)
            return torch.full_like(noise, 7.0)

    guider = Guider(models.sixteen_bit)
    guider.set_conds(conditioning(1), conditioning(2))
    mask, callback = torch.ones(1, 1, 16, 16), (lambda *_: None)
    sampled = guider.sample(
        torch.zeros(LATENT), torch.zeros(LATENT), *_sampler(models.sixteen_bit),
        denoise_mask=mask, callback=callback, disable_pbar=True, seed=11,
    )  # fmt: skip
    assert sampled.eq(7.0).all()
    assert seen["mask"].shape == (1, 4, 16, 16)
    assert (seen["callback"], seen["bar"], seen["seed"]) == (callback, True, 11)
    assert seen["latent_shapes"] == [torch.Size(LATENT)]
