"""What ComfyUI's own nodes, and others like IP-Adapter, put around a model that stays as it is.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_advanced import ModelComputeDtype, ModelSamplingDiscrete, RescaleCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_tomesd import TomePatchModel


def _image_prompt(model: ModelPatcher) -> ModelPatcher:
    """Add to each cross-attention what a module of its own makes of the query, as IP-Adapter."""
    clone, adapters = model.clone(), torch.nn.ModuleDict()

    def attended(out: torch.Tensor, extra: dict) -> torch.Tensor:
        channels = out.shape[-1]
        name = str(channels)
        if name not in adapters:
            adapters[name] = torch.nn.Linear(channels, channels).to(out.device, out.dtype)
        return out + 0.1 * adapters[name](out)

    clone.set_model_attn2_output_patch(attended)
    return clone


def _tiled(model: ModelPatcher) -> ModelPatcher:
    """Call the network twice for a step, as tiled diffusion does."""

    def halves(apply_model: Callable, args: dict) -> torch.Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        return 0.5 * (apply_model(x, t, **c) + apply_model(x, t, **c))

    clone = model.clone()
    clone.set_model_unet_function_wrapper(halves)
    return clone


def _by(node: type, *inputs: object) -> Callable[[ModelPatcher], ModelPatcher]:
    """Return what a node does with a MODEL and these other inputs."""

    def made(model: ModelPatcher) -> ModelPatcher:
        output = node.execute(model, *inputs)
        return getattr(output, "result", output)[0]

    return made


AROUND: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {
    "FreeU": _by(FreeU_V2, 1.3, 1.4, 0.9, 0.2),
    "HyperTile": _by(HyperTile, 256, 2, 0, False),
    "downscale": _by(PatchModelAddDownscale, 3, 2.0, 0.0, 0.5, True, "bicubic", "bicubic"),
    "ToMe": _by(TomePatchModel, 0.3),
    "image prompt": _image_prompt,
    "tiled": _tiled,
    "v prediction": lambda model: ModelSamplingDiscrete().patch(model, "v_prediction", False)[0],
    "rescaled cfg": lambda model: RescaleCFG().patch(model, 0.7)[0],
    "compute dtype": lambda model: ModelComputeDtype().patch(model, "fp32")[0],
}
"""They change no weight: what is recorded is still the model's."""

TWICE = "tiled"
"""The one that calls the network twice for each step."""
