"""Small models of other architectures, through ComfyUI's own classes.

ComfyUI knows models by their sizes; each class here is its own entry of the real one with smaller
numbers. Flux needs none: its sizes are read from the file.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
from comfy import sd1_clip, supported_models
from comfy.supported_models_base import BASE, ClipTarget
from comfy.utils import detect_layer_quantization
from safetensors.torch import save_file
from torch import Tensor

from toy.nodes.toy_sdxl import ToySDXL
from toy.shapes import CLIP_L, CLIP_LAYERS, clip_l_shapes
from toy.vae import vae_tensors
from toy.weights import clip_tensors, value_of

UNET_PREFIX = "model.diffusion_model."
CLIP_PREFIX = "cond_stage_model."
TOKENS = 7


class SmallClip(sd1_clip.SD1ClipModel):
    """SD1.5's text encoder, made smaller by the option that ComfyUI has for that."""

    CONFIG = {  # noqa: RUF012
        "hidden_size": CLIP_L, "intermediate_size": 4 * CLIP_L,
        "num_attention_heads": CLIP_L // 8, "num_hidden_layers": CLIP_LAYERS,
    }  # fmt: skip

    def __init__(self, device="cpu", dtype=None, model_options=None, quantization=None):
        options = {**(model_options or {}), "clip_l_model_config": self.CONFIG}
        if quantization is not None:  # as the large text encoders do it
            options["quantization_metadata"] = quantization
        super().__init__(device=device, dtype=dtype, model_options=options)


class SmallSD15(supported_models.SD15):
    """SD1.5: its transformers' projections are convolutions."""

    unet_config = {  # noqa: RUF012 (ComfyUI's own way, here and below)
        **supported_models.SD15.unet_config,
        "context_dim": 48,
        "model_channels": 32,
    }
    unet_extra_config = {"num_heads": 2, "num_head_channels": -1}  # noqa: RUF012

    def clip_target(self, state_dict=None):
        """The real tokenizer, and the small encoder as the file has it."""
        target = ClipTarget(sd1_clip.SD1Tokenizer, SmallClip)
        target.params["quantization"] = detect_layer_quantization(state_dict, CLIP_PREFIX)
        return target


class SmallRefiner(supported_models.SDXLRefiner):
    """The SDXL refiner: other conditioning."""

    unet_config = {  # noqa: RUF012
        **supported_models.SDXLRefiner.unet_config,
        "context_dim": 48,
        "model_channels": 32,
        "transformer_depth": [0, 1],
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}  # noqa: RUF012


class SmallSDXL(ToySDXL):
    """SDXL; an inpaint model has nine input channels, which ComfyUI reads from the file."""

    unet_config = {**ToySDXL.unet_config, "transformer_depth": [0, 1]}  # noqa: RUF012


class SmallLumina2(supported_models.Lumina2):
    """Lumina 2: NextDiT."""

    unet_config = {**supported_models.Lumina2.unet_config, "dim": 48}  # noqa: RUF012
    unet_extra_config = {  # noqa: RUF012
        "n_heads": 4, "n_kv_heads": 2, "axes_dims": [4, 4, 4], "axes_lens": [300, 512, 512],
        "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0,
    }  # fmt: skip


class SmallZImage(supported_models.ZImage):
    """Z-Image: NextDiT with its own modulation, which has 256 channels whatever the size."""

    unet_config = {**supported_models.ZImage.unet_config, "dim": 256}  # noqa: RUF012
    unet_extra_config = {  # noqa: RUF012
        "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0, "ffn_dim_multiplier": 1.0, "z_image_modulation": True,
        "time_scale": 1000.0, "pad_tokens_multiple": 32, "n_refiner_layers": 1,
    }  # fmt: skip


ENTRIES = (SmallSD15, SmallRefiner, SmallSDXL, SmallLumina2, SmallZImage)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A small model, and what it is sampled with.

    Attributes:
        entry: ComfyUI's, or one of those above.
        numbers: the entry's `unet_config`, as ComfyUI finds it in the file.
        latent: channels.
        context: width of the prompt's tokens.
        pooled: width of the pooled prompt, 0 for none.
        others: what a checkpoint has beside the diffusion model.
        dtype: that its files are in.
    """

    entry: type[BASE]
    numbers: dict
    latent: int
    context: int
    pooled: int = 0
    others: Callable[[], dict[str, Tensor]] = dict
    dtype: torch.dtype = torch.float16

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """Return the diffusion model in FP32, names relative to it."""
        model = self.entry({**self.entry.unet_config, **self.numbers}).get_model({}, "")
        values = {
            name: value_of(name, tuple(own.shape), seed)
            for name, own in model.diffusion_model.state_dict().items()
        }
        return {_name_in_file(name): value for name, value in values.items()}

    def write(self, path: Path, *, model_only: bool = False) -> Path:
        """Write a checkpoint, or the diffusion model alone."""
        prefix = "" if model_only else UNET_PREFIX
        tensors = {prefix + name: value for name, value in self.tensors().items()}
        tensors |= {} if model_only else self.others()
        os.makedirs(path.parent, exist_ok=True)
        in_file = {name: value.to(self.dtype).contiguous() for name, value in tensors.items()}
        save_file(in_file, path)
        return path

    def conditioning(self, seed: int) -> list:
        """Return a prompt, as a text encoder would."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(1, TOKENS, self.context, generator=generator)
        pooled = torch.randn(1, self.pooled, generator=generator) if self.pooled else None
        return [[hidden, {} if pooled is None else {"pooled_output": pooled}]]


def _name_in_file(name: str) -> str:
    """Return what Flux's files call its norms; ComfyUI renames them."""
    return name.replace("_norm.weight", "_norm.scale") if ".norm." in name else name


def _vae() -> dict[str, Tensor]:
    return {f"first_stage_model.{name}": value for name, value in vae_tensors().items()}


def _sd15_others() -> dict[str, Tensor]:
    prefix, clip = f"{CLIP_PREFIX}transformer.text_model.", {}
    for name, shape in clip_l_shapes():
        whole = (49408, CLIP_L) if "token_embedding" in name else shape
        clip[prefix + name] = value_of(name, whole, 0)
    return clip | _vae()


def _sdxl_others() -> dict[str, Tensor]:
    clip = {name: value for name, value in clip_tensors().items() if value.is_floating_point()}
    return clip | _vae()


def _unet(depth: list[int], **numbers: object) -> dict:
    """Return a UNet of two levels with one block each, and its transformers' depths."""
    return {
        "image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4,
        "out_channels": 4, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
        "transformer_depth": depth, "transformer_depth_middle": 1,
        "transformer_depth_output": [depth[0]] * 2 + [depth[1]] * 2, **numbers,
    }  # fmt: skip


_SDXL = {"num_classes": "sequential"}
_SDXL_INPAINT = {**_SDXL, "in_channels": 9}
_NEXTDIT = {"in_channels": 16, "cap_feat_dim": 48, "n_layers": 2, "qk_norm": True}
_FLUX = {
    "image_model": "flux", "axes_dim": [16, 56, 56], "num_heads": 1, "mlp_ratio": 4.0,
    "theta": 10000, "out_channels": 16, "qkv_bias": True, "txt_ids_dims": [], "in_channels": 16,
    "hidden_size": 128, "context_in_dim": 48, "patch_size": 2, "vec_in_dim": 32, "depth": 1,
    "depth_single_blocks": 2, "guidance_embed": True, "yak_mlp": False, "txt_norm": False,
}  # fmt: skip

ARCHITECTURES = {
    "SD1.5": Architecture(SmallSD15, _unet([1, 1]), 4, 48, 0, _sd15_others),
    "SDXL refiner": Architecture(SmallRefiner, _unet([0, 1], **_SDXL), 4, 48, 1280, _vae),
    "SDXL inpaint": Architecture(
        SmallSDXL, _unet([0, 1], **_SDXL_INPAINT), 4, 64, 1280, _sdxl_others
    ),
    "Lumina 2": Architecture(SmallLumina2, _NEXTDIT, 16, 48, dtype=torch.bfloat16),
    "Z-Image": Architecture(SmallZImage, _NEXTDIT, 16, 48, dtype=torch.bfloat16),
    "Flux": Architecture(supported_models.Flux, _FLUX, 16, 48, 32, dtype=torch.bfloat16),
}
