"""Beyond SDXL: other models are recorded, loaded, sampled with and exported through stock code."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import comfy.model_management as memory
import comfy.sample
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness.exports import identical, target_of, use_folders, wanted
from harness.inprocess import distance, held, same
from harness.recording import assert_measured, measured
from helpers import make_planner
from hswq.calibration import Statistics, monitored_layers
from hswq.loader import store
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.converter import convert
from hswq.loader.engine.loading import load_checkpoint, load_diffusion_model
from hswq.loader.engine.model_structure import detect, needed_beside
from hswq.loader.files.errors import ModelFileError
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.layer_formats import FILE_FORMATS
from hswq.loader.files.model_file import ModelFile
from hswq.loader.jobs import choice
from hswq.loader.jobs.export import export
from hswq.loader.jobs.search import search
from hswq.loader.recording.recorder import Recorder, unrecordable
from hswq.quant import QuantizeSettings, SearchSettings, quantize
from safetensors.torch import load_file, save_file
from toy.architectures import ARCHITECTURES, CLIP_PREFIX, ENTRIES, Architecture
from toy.shapes import CLIP_LAYERS

SAMPLES = store.USABLE_SAMPLES
QUICKLY = SearchSettings(bins=16, candidates=2, refinements=0)
STOCK_READS = ("compatible", "scaled")


class Recorded(NamedTuple):
    """A model that was sampled with by stock ComfyUI, and what was recorded of it."""

    architecture: Architecture
    checkpoint: Path
    alone: Path
    sixteen_bit: ModelPatcher
    statistics: Statistics
    calls: dict[str, list]


def sample(patcher: ModelPatcher, architecture: Architecture, batch: int = 1, steps: int = 2):
    """Sample without a negative prompt, so that what changes a weight is not amplified."""
    latent = torch.zeros(batch, architecture.latent, 16, 16)
    positive = architecture.conditioning(1)
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher, comfy.sample.prepare_noise(latent, 0), steps, 1.0, "euler", "simple",
            positive, positive, latent, disable_pbar=True,
        )  # fmt: skip


def stock(path: Path, dtype: torch.dtype | None = None) -> ModelPatcher:
    """Load a checkpoint's model by stock ComfyUI; on a CPU, with a dtype as on a GPU."""
    options = {} if dtype is None else {"dtype": dtype}
    return comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=False, output_clip=False, model_options=options
    )[0]


@pytest.fixture(scope="module")
def entries():
    """ComfyUI knows the small models; Lumina's own entry would take any."""
    with pytest.MonkeyPatch.context() as patch:
        known = [*ENTRIES, *comfy.supported_models.models]
        patch.setattr(comfy.supported_models, "models", known)
        yield


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request, entries, tmp_path_factory) -> Recorded:
    """Record one model in 16 bit, as users do, with every layer in every forward."""
    folder, architecture = tmp_path_factory.mktemp("models"), ARCHITECTURES[request.param]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        use_folders(folder, patch)
        patch.setattr(folder_paths, "user_directory", str(folder / "user"))
        (folder / "user" / "default").mkdir(parents=True)
        settings = folder / "user" / "default" / "comfy.settings.json"
        settings.write_text(json.dumps({"HSWQ.Budget": 100}))
        checkpoint = architecture.write(folder / "model.safetensors")
        alone = architecture.write(folder / "alone.safetensors", model_only=True)
        sixteen_bit = stock(checkpoint, architecture.dtype)
        recorder = Recorder()
        recorder.install()
        names = list(monitored_layers(sixteen_bit.model.diffusion_model))
        try:
            with measured(sixteen_bit, names) as calls:
                sample(sixteen_bit, architecture, SAMPLES, steps=store.USABLE_CALLS)
        finally:
            recorder.remove()
        statistics = store.statistics_of(fingerprint(str(checkpoint)))
        yield Recorded(architecture, checkpoint, alone, sixteen_bit, statistics, calls)


def plan_of(made: Recorded) -> choice.Choice:
    """Return how the loader nodes quantize a model: by what was recorded of it."""
    known = fingerprint(str(made.checkpoint))
    return choice.choose(choice.AUTO, known, "", QuantizeSettings(), choice.FAIL)


def loaded(made: Recorded, *, alone: bool = False) -> ModelPatcher:
    """Load a model so, from its checkpoint or from the diffusion model alone."""
    chosen = plan_of(made)
    if alone:
        patcher = load_diffusion_model(str(made.alone), chosen.decider)
    else:
        patcher = load_checkpoint(str(made.checkpoint), chosen.decider, only_model=True)[0]
    chosen.keep(patcher.get_attachment(ATTACHMENT))
    return patcher


class TestArchitecture:
    def test_is_the_real_one(self, made):
        entry = made.architecture.entry
        real = type(made.sixteen_bit.model.model_config)
        assert real is entry
        assert entry in ENTRIES or entry is comfy.supported_models.Flux

    def test_records_every_layer(self, made):
        network = made.sixteen_bit.model.diffusion_model
        assert made.statistics.samples == SAMPLES
        assert list(made.statistics) == list(monitored_layers(network))
        assert_measured(made.statistics, made.calls)
        for name, layer in monitored_layers(network).items():
            channels = getattr(layer, "in_channels", None) or layer.in_features
            assert made.statistics[name].importance.numel() == channels, name

    def test_loads_alike_from_both_kinds_of_file(self, made):
        one, other = loaded(made), loaded(made, alone=True)
        assert fingerprint(str(made.alone)) == fingerprint(str(made.checkpoint))
        plan = one.get_attachment(ATTACHMENT)
        assert not same(held(one), held(other))
        assert list(plan.layers) == list(made.statistics)
        assert len(plan.kept) == int(0.25 * len(plan.layers))

    def test_samples_close_to_16_bit(self, made):
        """Closer than a plain cast, and than all layers' errors that add up as in a chain."""
        expected = sample(made.sixteen_bit, made.architecture)
        quantized = loaded(made)
        cast = stock(made.checkpoint, torch.float8_e4m3fn)
        layers = quantized.get_attachment(ATTACHMENT).layers.values()
        bound = math.sqrt(sum((layer.relative_error or 0.0) ** 2 for layer in layers))
        apart = distance(sample(quantized, made.architecture), expected)
        assert 0 < apart < min(bound, distance(sample(cast, made.architecture), expected))
        assert bound < 0.25

    @pytest.mark.parametrize("kind", FILE_FORMATS)
    def test_exports_what_it_loads(self, made, kind):
        settings = wanted(kind)
        path = target_of(settings, settings.file_format.short)
        plan = export(str(made.checkpoint), path, settings).plan
        stored = load_checkpoint(str(path), None, only_model=True)[0]
        ours = held(load_checkpoint(str(made.checkpoint), plan, only_model=True)[0])
        convs = {key for key, (data, *scale) in ours.items() if data.ndim == 4 and scale}
        expected = convs if settings.file_format.conv is None else set()
        assert set(same(held(stored), ours)) == expected
        assert len(plan.quantized) > len(plan.kept)
        if kind in STOCK_READS:
            theirs = stock(path)
            apart = distance(*(sample(one, made.architecture) for one in (theirs, stored)))
            # On a GPU, stock multiplies its scale in 16 bit, of which BF16 has eight digits.
            assert apart == 0 if theirs.load_device.type == "cpu" else apart < 0.03

    def test_converts_to_what_it_loads(self, made):
        quantized = loaded(made)
        with torch.inference_mode():
            converted = convert(made.sixteen_bit, quantized.get_attachment(ATTACHMENT))
        assert not same(held(converted), held(quantized))
        assert torch.equal(*(sample(one, made.architecture) for one in (converted, quantized)))

    def test_leaves_text_encoder_and_vae_as_they_are(self, made):
        expected = comfy.sd.load_checkpoint_guess_config(str(made.checkpoint))[1:3]
        found = load_checkpoint(str(made.checkpoint), plan_of(made).decider)[1:]
        for theirs, ours in zip(map(weights, expected), map(weights, found), strict=True):
            assert ours.keys() == theirs.keys()
            assert [key for key in theirs if not theirs[key].equal(ours[key])] == []
            assert all(value.dtype.itemsize > 1 for value in ours.values())


LAYOUTS = {
    "Flux": comfy.utils.flux_to_diffusers,
    "Z-Image": lambda numbers: comfy.utils.z_image_to_diffusers({**numbers, "dim": 256}),
}


def in_diffusers_layout(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model as diffusers has it: some layers are in several parts, or turned around."""
    theirs = {key.replace("_norm.scale", "_norm.weight"): value for key, value in tensors.items()}
    found, given = {}, set()
    for key, place in LAYOUTS[name](ARCHITECTURES[name].numbers).items():
        own, part, turn, *_ = (place, None, None) if isinstance(place, str) else (*place, None)
        if own not in theirs or (part is None and own in given):
            continue  # it has no such layer, or it was under another name before
        given.add(own)
        value = theirs[own] if part is None else theirs[own].narrow(*part)
        found[key] = (turn(value) if turn else value).contiguous()
    return found | {key: value for key, value in theirs.items() if key not in given}


@pytest.mark.parametrize("name", LAYOUTS)
class TestDiffusersLayout:
    """ComfyUI puts some layers together from several tensors, before ours see them."""

    @pytest.fixture
    def files(self, entries, tmp_path, name) -> tuple[str, str]:
        """A diffusion model in ComfyUI's layout, and in diffusers'."""
        own = ARCHITECTURES[name].write(tmp_path / "own.safetensors", model_only=True)
        theirs = tmp_path / "theirs.safetensors"
        save_file(in_diffusers_layout(name, load_file(own)), theirs)
        return str(own), str(theirs)

    def test_gives_the_same_weights(self, files):
        planner = functools.partial(make_planner, None, 0.25, scaled=True, settings=QUICKLY)
        own, theirs = (load_diffusion_model(path, planner()) for path in files)
        assert own.get_attachment(ATTACHMENT).quantized
        assert not same(held(theirs), held(own))

    def test_is_searched_ahead(self, files):
        planner = functools.partial(make_planner, None, 0.25, scaled=True, settings=QUICKLY)
        (own, _), (theirs, searched) = (search(ModelFile(path), planner()) for path in files)
        assert theirs == own
        assert searched == len(own.layers) > 0

    def test_is_no_checkpoint(self, files):
        with pytest.raises(ModelFileError, match="holds only a diffusion model"):
            load_checkpoint(files[1], make_planner(None, 0.25, scaled=True, settings=QUICKLY))

    def test_is_not_exported(self, files):
        with pytest.raises(ModelFileError, match="is not in ComfyUI's own layout"):
            export(files[1], target_of(wanted()), wanted(without=choice.QUANTIZE_UNIFORMLY))


class TestScaledTextEncoder:
    def test_stays_fp8_with_its_scales(self, entries, tmp_path):
        """It has a marker of its own, as T5 in checkpoints of Flux and SD3."""
        path = ARCHITECTURES["SD1.5"].write(tmp_path / "both.safetensors")
        tensors = load_file(path)
        tensors[f"{CLIP_PREFIX}scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
        for key in [key for key in tensors if CLIP_PREFIX in key and key.endswith("fc1.weight")]:
            tensors[key], scale = quantize(tensors[key], tensors[key].abs().amax(), scaled=True)
            tensors[key.replace(".weight", ".scale_weight")] = scale
        save_file(tensors, path)
        theirs = comfy.sd.load_checkpoint_guess_config(str(path), output_model=False)[1]
        ours = load_checkpoint(str(path), make_planner(None, 0.25, scaled=True, settings=QUICKLY))[
            1
        ]
        expected, found = weights(theirs), weights(ours)
        assert sum(value.dtype == torch.float8_e4m3fn for value in expected.values()) == CLIP_LAYERS
        assert found.keys() == expected.keys()
        assert all(identical(found[key], expected[key]) for key in expected)


class TestUnknownLayers:
    """A model whose layers no loader could replace says so, and is not recorded."""

    @pytest.mark.parametrize("own", [torch.nn.Linear, torch.nn.Conv2d])
    def test_are_named(self, models, own):
        patcher = models.sixteen_bit
        network = patcher.model.diffusion_model
        assert unrecordable(patcher) is None
        network.extra = own(4, 4, 1)
        try:
            reason = "1 layers of SDXL, such as extra, are not made by ComfyUI"
            assert unrecordable(patcher) == reason
        finally:
            del network.extra

    def test_no_layers(self, models):
        patcher = models.sixteen_bit
        network = patcher.model.diffusion_model
        patcher.model.diffusion_model = torch.nn.ReLU().eval()
        try:
            assert unrecordable(patcher) == "SDXL has no Linear or Conv2d layers"
        finally:
            patcher.model.diffusion_model = network


def weights(model: comfy.sd.CLIP | comfy.sd.VAE | None) -> dict[str, torch.Tensor]:
    """Return a text encoder's or a VAE's weights, none where a file has none."""
    network = getattr(model, "cond_stage_model", None) or getattr(model, "first_stage_model", None)
    found = {} if network is None else network.state_dict()
    # It is in no file, so nobody sets it.
    return {key: value for key, value in found.items() if "clip_l.transformer.text_proj" not in key}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_step_needs_is_known_before_a_load(entries, tmp_path, monkeypatch, name, alone):
    """As ComfyUI asks the model that it has loaded."""
    its = ARCHITECTURES[name]
    path = its.write(tmp_path / "model.safetensors", model_only=alone)
    if alone:
        loaded = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": its.dtype})
    else:
        loaded = stock(path, its.dtype)
    for counts_dtype in (False, True):
        monkeypatch.setattr(memory, "xformers_enabled", lambda counts=counts_dtype: counts)
        expected = loaded.model.memory_required([2, its.latent, 128, 128])
        assert needed_beside(ModelFile(path)) == expected > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_ends_are_found(entries, tmp_path, name):
    """The first and the last projection, whatever they are called."""
    path = ARCHITECTURES[name].write(tmp_path / "model.safetensors")
    expected = {"input_blocks.0.0", "out.2"}
    if name == "Flux":
        expected = {"img_in", "final_layer.linear"}
    elif name in ("Lumina 2", "Z-Image"):
        expected = {"x_embedder", "final_layer.linear"}
    structure = detect(ModelFile(path))
    assert {structure.first, structure.last} == expected
