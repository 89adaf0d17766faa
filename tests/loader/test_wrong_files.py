"""Files that are no 16-bit diffusion model get one sentence, whichever way they are loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from helpers import make_planner
from hswq.loader.engine.loading import load_checkpoint, load_diffusion_model
from hswq.loader.engine.model_structure import find_layers, layers_of
from hswq.loader.files.errors import ModelFileError
from hswq.loader.files.model_file import ModelFile
from hswq.quant import Planner, SearchSettings
from safetensors.torch import save_file
from toy.checkpoint import UNET_PREFIX, checkpoint_tensors
from toy.vae import vae_tensors
from toy.weights import CLIP_L_PREFIX, clip_tensors

File = dict[str, torch.Tensor]

LAYER = "output_blocks.5.0.out_layers.3"


def planner() -> Planner:
    """Return one that searches quickly."""
    return make_planner(None, 0.25, scaled=True, settings=SearchSettings(16, 2, 0))


WAYS = {
    "checkpoint loader": lambda path: load_checkpoint(path, planner()),
    "diffusion model loader": lambda path: load_diffusion_model(path, planner()),
    "stock loader for now": lambda path: find_layers(ModelFile(path)),
    "export": lambda path: layers_of(ModelFile(path)),
}


def under(prefix: str, tensors: File) -> File:
    """Return what begins with a prefix, without it."""
    return {k.removeprefix(prefix): value for k, value in tensors.items() if k.startswith(prefix)}


def vae() -> File:
    config = {
        "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    return AutoencoderKL(ddconfig=config, embed_dim=4).state_dict()


def t5() -> File:
    block, square = "encoder.block.0.layer", torch.zeros(64, 64)
    return {
        "shared.weight": square,
        **{f"{block}.0.SelfAttention.{part}.weight": square.clone() for part in "qkvo"},
        f"{block}.1.DenseReluDense.wi_0.weight": square.clone(),
    }


def without_layer(tensors: File) -> File:
    return {key: value for key, value in tensors.items() if LAYER not in key}


def controlnet() -> File:
    """Return a ControlNet without a prefix: it begins as a UNet does, and has no way up."""
    shared = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
    unet = under(UNET_PREFIX, checkpoint_tensors())
    return {key: value for key, value in unet.items() if key.startswith(shared)}


WRONG: dict[str, Callable[[], File]] = {
    "VAE": vae,
    "tiny VAE": vae_tensors,
    "VAE of a checkpoint": lambda: {f"first_stage_model.{k}": v for k, v in vae().items()},
    "text encoder": lambda: under(CLIP_L_PREFIX, clip_tensors()),
    "text encoders of a checkpoint": clip_tensors,
    "T5": t5,
    "ControlNet": controlnet,
    "ControlNet with prefix": lambda: {f"control_model.{k}": v for k, v in controlnet().items()},
    "LoRA": lambda: {
        "lora_unet_out_2.lora_up.weight": torch.zeros(4, 4),
        "lora_unet_out_2.lora_down.weight": torch.zeros(4, 4),
    },
    "embedding": lambda: {"clip_l": torch.zeros(3, 64), "clip_g": torch.zeros(3, 64)},
    "upscaler": lambda: {"conv_first.weight": torch.zeros(64, 3, 3, 3)},
    "nothing": dict,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrong")


def write(folder: Path, name: str, tensors: Callable[[], File]) -> str:
    """Write a file unless it is there."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        save_file({key: value.contiguous() for key, value in tensors().items()}, path)
    return str(path)


@pytest.mark.parametrize("way", WAYS)
class TestNoDiffusionModel:
    @pytest.mark.parametrize("kind", WRONG)
    def test_is_refused_by_name(self, folder, kind, way):
        path = write(folder, kind, WRONG[kind])
        with pytest.raises(ModelFileError) as caught:
            WAYS[way](path)
        message = str(caught.value)
        assert message.startswith(f"{kind}.safetensors ")
        assert re.search("no diffusion model|cannot be loaded as a diffusion model", message)
        assert "\n" not in message

    def test_nor_one_that_lacks_layers(self, folder, way):
        path = write(folder, "lacking", lambda: without_layer(checkpoint_tensors()))
        reason = rf"lacking\.safetensors .* lacks 1 of the 264 layers .*UNetModel.* {LAYER}$"
        with pytest.raises(ModelFileError, match=reason):
            WAYS[way](path)

    def test_nor_one_of_another_shape(self, folder, way):
        other = {f"{UNET_PREFIX}{LAYER}.weight": torch.zeros(32, 32, 1, 1)}
        path = write(folder, "shapes", lambda: checkpoint_tensors() | other)
        with pytest.raises(ModelFileError, match=rf"^shapes.* {LAYER}.weight has the shape \(32, "):
            WAYS[way](path)


def nvfp4(weight: torch.Tensor) -> File:
    rows, columns = weight.shape
    return {
        "weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        "weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.ones(()),
    }


OTHER_FORMATS: dict[str, tuple[str, Callable[[torch.Tensor], File]]] = {
    "NVFP4": ("U8", nvfp4),
    "FP8 e5m2": ("F8_E5M2", lambda w: {"weight": w.to(torch.float8_e5m2)}),
    "bitsandbytes": ("U8", lambda w: {"weight": torch.zeros(w.numel() // 2, 1).to(torch.uint8)}),
    "SVDQuant": ("I8", lambda w: {"qweight": torch.zeros(w.shape[0], 8).to(torch.int8)}),
}


@pytest.fixture(params=OTHER_FORMATS)
def quantized_otherwise(request, folder) -> tuple[str, str]:
    """A checkpoint whose queries are in another format, and their dtype."""
    dtype, convert = OTHER_FORMATS[request.param]

    def tensors() -> File:
        found = checkpoint_tensors()
        for key in [key for key in found if key.endswith("attn1.to_q.weight")]:
            layer = key.removesuffix("weight")
            found |= {layer + name: value for name, value in convert(found.pop(key)).items()}
        return found

    return write(folder, request.param, tensors), dtype


class TestQuantizedOtherwise:
    def test_is_refused_by_name(self, quantized_otherwise):
        path, dtype = quantized_otherwise
        name = Path(path).name
        with pytest.raises(ModelFileError, match=f"^{name} is quantized already, .* to {dtype}: "):
            assert ModelFile(path).is_quantized

    @pytest.mark.parametrize("way", ["checkpoint loader", "diffusion model loader"])
    def test_by_the_loaders_too(self, quantized_otherwise, way):
        with pytest.raises(ModelFileError, match="is quantized already"):
            WAYS[way](quantized_otherwise[0])
