"""Files that are quantized already: each keeps what it has, 16-bit layers in 16 bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness.inprocess import alike, held, same, sample
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint, load_diffusion_model
from hswq.loader.files.errors import ModelFileError
from hswq.loader.files.layer_formats import stored_scale
from hswq.loader.files.model_file import ModelFile
from hswq.quant import Plan, fp8_format, quantize
from safetensors.torch import load_file, save_file

PREFIX = "model.diffusion_model."
MARKER = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
# How each format keeps a layer's scale: its key, and its shape.
SCALED = {
    "original V2": ("scale", (1,)),
    "original V2, by weight": ("weight.scale", (1,)),
    "comfy_quant": ("weight_scale", ()),
    "comfy before comfy_quant": ("scale_weight", ()),
}


def marker(content: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def store(checkpoint: Path, plan: Plan, path: Path, kind: str) -> Path:
    """Write the checkpoint with the Plan's layers in FP8, in one of the formats or as V1."""
    tensors = load_file(checkpoint)
    for name in plan.quantized:
        key = f"{PREFIX}{name}."
        amax = plan.layers[name].amax
        tensors[key + "weight"], scale = quantize(
            tensors[key + "weight"], amax, scaled=kind in SCALED
        )
        if kind in SCALED:
            scale_key, shape = SCALED[kind]
            tensors[key + scale_key] = scale.reshape(shape)
        if kind == "comfy_quant":
            tensors[key + "comfy_quant"] = marker(MARKER)
    save_file(tensors, path)
    return path


class TestFormats:
    @pytest.mark.parametrize("kind", SCALED)
    def test_scaled_ones_are_the_loaders_own_weights(self, models, checkpoint, tmp_path, kind):
        plan = models.quantized.get_attachment(ATTACHMENT)
        path = store(checkpoint, plan, tmp_path / "stored.safetensors", kind)
        stored = load_checkpoint(str(path), None, only_model=True)[0]
        assert not same(held(stored), held(models.quantized))
        assert alike(sample(stored), sample(models.quantized))
        again = stored.get_attachment(ATTACHMENT)
        assert (again.quantized, again.kept) == (plan.quantized, plan.kept)
        assert again.number_format.scaled

    def test_load_again_gives_the_same_weights(self, models, checkpoint, tmp_path):
        plan = models.quantized.get_attachment(ATTACHMENT)
        path = store(checkpoint, plan, tmp_path / "stored.safetensors", "comfy_quant")
        stored = load_checkpoint(str(path), None, only_model=True)[0]
        load, arguments = stored.cached_patcher_init
        assert not same(held(load(*arguments, disable_dynamic=True)), held(stored))


PUBLISHED = ("original V1", "original V2", "original V2, by weight")
WHOLE, UNET, BARE = "full checkpoint", "UNet", "UNet without prefix"


@pytest.mark.parametrize("contents", [WHOLE, UNET, BARE])
@pytest.mark.parametrize("kind", PUBLISHED)
class TestPublished:
    """The files that the original's author and others have published."""

    def load(self, path: Path, kind: str, contents: str, models, checkpoint) -> ModelPatcher:
        store(checkpoint, models.quantized.get_attachment(ATTACHMENT), path, kind)
        tensors = load_file(path)
        if contents != WHOLE:
            tensors = {key: value for key, value in tensors.items() if key.startswith(PREFIX)}
        if contents == BARE:
            tensors = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
        save_file(tensors, path)
        assert ModelFile(str(path)).is_quantized
        if contents == WHOLE:
            return load_checkpoint(str(path), None, only_model=True)[0]
        return load_diffusion_model(str(path), None)

    def test_keep_what_they_have(self, models, checkpoint, tmp_path, kind, contents):
        path = tmp_path / "published.safetensors"
        found = held(self.load(path, kind, contents, models, checkpoint))
        plan, in_file = models.quantized.get_attachment(ATTACHMENT), load_file(path)
        prefix = "" if contents == BARE else PREFIX
        for name in plan.layers:
            data, *scale = found[f"{name}.weight"]
            expected = in_file[f"{prefix}{name}.weight"]
            assert data.dtype == expected.dtype
            assert torch.equal(data.view(torch.uint8), expected.view(torch.uint8))
            assert (data.dtype == torch.float16) == (name in plan.kept)
            if scale and kind in SCALED:
                key = f"{prefix}{name}.{SCALED[kind][0]}"
                assert scale[0].item() == in_file[key].item() != 1.0
            elif scale:
                assert scale[0].item() == 1.0

    def test_are_what_our_loader_makes(self, models, checkpoint, tmp_path, kind, contents):
        published = self.load(tmp_path / "a.safetensors", kind, contents, models, checkpoint)
        plan = models.quantized.get_attachment(ATTACHMENT)
        same_plan = dataclasses.replace(plan, number_format=fp8_format(kind in SCALED))
        ours = load_checkpoint(str(checkpoint), same_plan, only_model=True)[0]
        assert not same(held(published), held(ours))
        assert alike(sample(published), sample(ours))
        assert published.get_attachment(ATTACHMENT).number_format == same_plan.number_format


class TestRefused:
    @pytest.fixture
    def broken(self, models, checkpoint, tmp_path):
        """Return a writer of a comfy_quant file with one layer's keys changed."""
        plan = models.quantized.get_attachment(ATTACHMENT)
        path = store(checkpoint, plan, tmp_path / "broken.safetensors", "comfy_quant")

        def write(**changes: torch.Tensor) -> str:
            tensors = load_file(path)
            name = f"{PREFIX}{plan.quantized[0]}."
            save_file({**tensors, **{name + k: v for k, v in changes.items()}}, path)
            return str(path)

        return write

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"comfy_quant": marker({"format": "mxfp8"})}, "stored in the format 'mxfp8'"),
            ({"comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "damaged comfy_quant marker"),
            ({"weight_scale": torch.zeros(2)}, "not a single positive number"),
            ({"weight_scale": torch.tensor(torch.nan)}, "not a single positive number"),
            ({"weight_scale": torch.tensor(-1.0)}, "not a single positive number"),
        ],
    )
    def test_a_layer_that_is_not_understood(self, broken, changes, reason):
        with pytest.raises(ModelFileError, match=rf"^broken\.safetensors: .*{reason}"):
            load_checkpoint(broken(**changes), None, only_model=True)

    def test_a_16_bit_file_taken_for_a_quantized_one(self, checkpoint):
        assert not ModelFile(str(checkpoint)).is_quantized
        with pytest.raises(ModelFileError, match=r"toy\.safetensors is not quantized"):
            load_checkpoint(str(checkpoint), None)

    def test_a_quantized_file_to_be_quantized(self, models, checkpoint, tmp_path):
        plan = models.quantized.get_attachment(ATTACHMENT)
        path = store(checkpoint, plan, tmp_path / "v1.safetensors", "original V1")
        assert ModelFile(str(path)).is_quantized
        with pytest.raises(ModelFileError, match=r"v1\.safetensors is quantized already"):
            load_checkpoint(str(path), plan)


INT8_MARKER = marker({"format": "int8_tensorwise"})


@pytest.mark.parametrize(
    ("weight", "scale", "its_marker", "reason"),
    [
        (torch.tensor(1, dtype=torch.int8), torch.ones(1), INT8_MARKER, "a single number"),
        (torch.ones(2, 2).to(torch.int8), torch.ones(3), INT8_MARKER, "1 or 2 positive numbers"),
        (torch.ones(2, 2).to(torch.int8), torch.ones(1), torch.full((5000,), 91, dtype=torch.uint8),
         "a comfy_quant marker of 5000 bytes"),
        (torch.ones(2, 2).to(torch.int8), torch.ones(1), torch.full((4000,), 91, dtype=torch.uint8),
         "a damaged comfy_quant marker"),
        (torch.ones(2, 2).to(torch.int8), torch.ones(1), marker({"format": "x" * 3000}),
         "stored in the format 'xxx"),
    ],
)  # fmt: skip
def test_a_forged_layer_is_refused_in_a_short_sentence(weight, scale, its_marker, reason):
    layer = {"a.weight": weight, "a.weight_scale": scale, "a.comfy_quant": its_marker}
    with pytest.raises(ModelFileError, match=reason) as caught:
        stored_scale(layer, "a.")
    assert len(str(caught.value)) < 200
