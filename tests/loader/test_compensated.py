"""Compensated rounding, from what real samplings record to what loader and export make."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import comfy.sample
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness.inprocess import distance, held, same
from hswq.calibration import monitored_layers
from hswq.loader import store
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.engine.patchers import quantized_layers
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.model_file import ModelFile
from hswq.loader.host.folders import FOLDER
from hswq.loader.jobs import choice
from hswq.loader.jobs.also_keep import ENDS, also_kept
from hswq.loader.jobs.export import ExportSettings, export
from hswq.loader.recording.recorder import Recorder
from hswq.loader.store import refined
from hswq.quant import FP8_SCALED, BySensitivity, QuantizeSettings, Reason
from hswq.quant.formats import fp8 as formats_fp8
from toy.checkpoint import make_trained_checkpoint
from toy.drawing import EDGE

STEPS = 20
NEAREST = QuantizeSettings(selection=BySensitivity(0.0))
COMPENSATED = dataclasses.replace(NEAREST, compensated=True)


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Recorded by the real recorder while stock ComfyUI samples."""
    folder: Path = tmp_path_factory.mktemp("trained")
    path = make_trained_checkpoint(folder / "trained.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        known = folder_paths.folder_names_and_paths
        patch.setitem(known, FOLDER, ([str(folder / "hswq")], {".pt"}))
        patch.setattr(folder_paths, "user_directory", str(folder / "user"))
        with torch.inference_mode():
            patcher, clip = comfy.sd.load_checkpoint_guess_config(str(path))[:2]
            tokens = clip.tokenize("a red square on white")
            prompt = [list(clip.encode_from_tokens(tokens, return_pooled=True))]
            prompt = [[prompt[0][0], {"pooled_output": prompt[0][1]}]]
        recorder = Recorder()
        recorder.install()
        try:
            for seed in range(8):
                sample(patcher, prompt, seed)
        finally:
            recorder.remove()
        yield Trained(str(path), patcher, prompt)


def load(trained: Trained, settings: QuantizeSettings, keep: bool = False) -> ModelPatcher:
    """Load as the node does; `keep` what was rounded for the next load."""
    file = ModelFile(trained.path)
    chosen = choice.choose(choice.AUTO, fingerprint(file), file.name, settings, choice.FAIL)
    patcher = load_checkpoint(file, chosen.decider, only_model=True)[0]
    chosen.keep(patcher.get_attachment(ATTACHMENT))
    if keep:
        chosen.keep_rounded(quantized_layers(patcher))
    return patcher


class TestLoaded:
    def test_differs_in_bytes_alone(self, trained):
        one, other = load(trained, NEAREST), load(trained, COMPENSATED)
        plan, again = (each.get_attachment(ATTACHMENT) for each in (one, other))
        assert {name: layer.amax for name, layer in plan.layers.items()} == {
            name: layer.amax for name, layer in again.layers.items()
        }
        assert len(same(held(one), held(other))) > 50
        weights = monitored_layers(one.model.diffusion_model)
        for name, layer in monitored_layers(other.model.diffusion_model).items():
            assert layer.weight.params.scale.equal(weights[name].weight.params.scale)

    def test_is_closer_to_the_original(self, trained):
        """Of pictures with another seed than those recorded."""
        original = sample(trained.patcher, trained.prompt, 1000)
        nearest = distance(sample(load(trained, NEAREST), trained.prompt, 1000), original)
        compensated = distance(sample(load(trained, COMPENSATED), trained.prompt, 1000), original)
        assert compensated < 0.75 * nearest

    def test_says_what_error_to_expect(self, trained):
        plan = load(trained, COMPENSATED).get_attachment(ATTACHMENT)
        assert 0.002 < plan.output_error < 0.012
        assert load(trained, NEAREST).get_attachment(ATTACHMENT).output_error is None

    def test_loaded_again_is_the_same(self, trained):
        one, other = load(trained, COMPENSATED), load(trained, COMPENSATED)
        assert one.get_attachment(ATTACHMENT) == other.get_attachment(ATTACHMENT)
        assert not same(held(one), held(other))

    def test_a_clone_with_weights_of_its_own_is_the_same(self, trained):
        one = load(trained, COMPENSATED)
        reload, arguments = one.cached_patcher_init
        assert not same(held(reload(*arguments, disable_dynamic=True)), held(one))


class TestKept:
    def test_the_next_load_rounds_nothing(self, trained, monkeypatch):
        one = load(trained, COMPENSATED, keep=True)
        monkeypatch.setattr(formats_fp8, "quantize_compensated", None)
        assert not same(held(load(trained, COMPENSATED, keep=True)), held(one))

    def test_only_what_is_damaged_is_rounded_again(self, trained):
        one = load(trained, COMPENSATED, keep=True)
        (path,) = refined.refined_folder().glob("*.safetensors")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        damaged = path.with_suffix(".damaged")
        damaged.write_bytes(content)  # not in place: the first model's weights are mapped
        damaged.replace(path)
        assert not same(held(load(trained, COMPENSATED, keep=True)), held(one))
        assert path.read_bytes() != content

    def test_not_of_rounding_to_the_nearest(self, trained):
        before = set(refined.refined_folder().glob("*"))
        load(trained, NEAREST, keep=True)
        assert set(refined.refined_folder().glob("*")) == before


class TestEnds:
    def test_stay_in_16_bit(self, trained):
        ends = also_kept(ENDS, ModelFile(trained.path))
        kept = dataclasses.replace(COMPENSATED, selection=BySensitivity(0.0, ends))
        plan = load(trained, kept).get_attachment(ATTACHMENT)
        assert set(plan.kept) == {"input_blocks.0.0", "out.2"}
        assert {plan.layers[name].reason for name in plan.kept} == {Reason.KEPT_BY_NAME}

    def test_by_name(self, trained):
        file = ModelFile(trained.path)
        assert also_kept("", file) == frozenset()
        assert also_kept(" last ,time_embed.0", file) == {"out.2", "time_embed.0"}
        with pytest.raises(ValueError, match="also_keep names 'middle'"):
            also_kept("first, middle", file)


class TestExport:
    def test_is_what_the_loader_has(self, trained, tmp_path):
        settings = ExportSettings(
            "scaled, convs too", choice.AUTO, 0.0, choice.FAIL, also_keep=ENDS, compensated=True
        )
        exported = export(trained.path, tmp_path / "exported.safetensors", settings)
        assert exported.plan.output_error is not None
        read = load_checkpoint(str(tmp_path / "exported.safetensors"), None, only_model=True)[0]
        ends = also_kept(ENDS, ModelFile(trained.path))
        kept = dataclasses.replace(COMPENSATED, selection=BySensitivity(0.0, ends))
        assert not same(held(read), held(load(trained, kept)))


def test_without_sketches_it_is_published_hswq(trained):
    of = fingerprint(trained.path)
    statistics = store.quantizing_statistics(of)
    planner = choice.planner_for(statistics, COMPENSATED, sketches=None)
    assert planner.number_format == FP8_SCALED
    found = load_checkpoint(trained.path, planner, only_model=True)[0]
    assert not same(held(found), held(load(trained, NEAREST)))
