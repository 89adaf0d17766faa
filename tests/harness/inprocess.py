"""Models in this process: sampling with them, and looking at their weights.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.samplers import CFGGuider
from hswq.quant import dequantize
from torch import Tensor
from toy.shapes import CONTEXT, POOLED

LATENT = (1, 4, 16, 16)
Conditioning = list


def load_16_bit(path: Path) -> ModelPatcher:
    """Load a checkpoint's model by stock ComfyUI; on a CPU, in 16 bit as on a GPU."""
    return comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=False, output_clip=False, model_options={"dtype": torch.float16}
    )[0]


def noise(seed: int = 0, batch: int = 1) -> Tensor:
    """Return latent noise."""
    return comfy.sample.prepare_noise(torch.zeros(batch, *LATENT[1:]), seed)


def conditioning(seed: int = 0) -> Conditioning:
    """Return a prompt, as a text encoder would."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, 77, CONTEXT, generator=generator)
    return [[hidden, {"pooled_output": torch.randn(1, POOLED, generator=generator)}]]


def sample(
    patcher: ModelPatcher,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    *,
    steps: int = 1,
    cfg: float = 1.0,
    batch: int = 1,
    sampler: str = "euler",
    callback: Callable | None = None,
) -> Tensor:
    """Sample as the KSampler node does, and return the latent.

    By default one step without a negative prompt, so that what changes a weight changes the
    result about as much.
    """
    return comfy.sample.sample(
        patcher, noise(batch=batch), steps, cfg, sampler, "normal", positive or conditioning(1),
        negative or conditioning(2), torch.zeros(batch, *LATENT[1:]), disable_pbar=True,
        callback=callback,
    )  # fmt: skip


def guide(guider: CFGGuider, *, steps: int = 1) -> Tensor:
    """Sample with a guider, as the node for custom sampling does."""
    sigmas = comfy.samplers.calculate_sigmas(
        guider.model_patcher.get_model_object("model_sampling"), "normal", steps
    )
    return guider.sample(
        noise(), torch.zeros(LATENT), comfy.samplers.sampler_object("euler"), sigmas,
        disable_pbar=True,
    )  # fmt: skip


def distance(a: Tensor, b: Tensor) -> float:
    """Return how far `a` is from `b`, relative to `b`."""
    a, b = a.float(), b.float()
    return ((a - b).norm() / b.norm()).item()


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same computation are equal.

    On a GPU they may differ by 1%, of one 16-bit model too: it takes other kernels for weights
    that lie elsewhere.
    """
    return distance(a, b) < 0.02 if torch.cuda.is_available() else a.equal(b)


def effect(patcher: ModelPatcher, patched: ModelPatcher, **how) -> Tensor:
    """Return what a patch changes in a sampling."""
    return sample(patched, **how) - sample(patcher, **how)


def assert_same_effect(
    models: tuple[ModelPatcher, ModelPatcher],
    change: Callable[[ModelPatcher], ModelPatcher],
    *,
    at_least: float = 0.05,
    at_most: float = 0.5,
    **how,
) -> None:
    """Check that a change has the effect on the second model that it has on the first.

    One that is missing is off by 1, one of twice the size too; quantization alone by less than
    half of that, as long as the effect is not small.

    Args:
        models: the one in 16 bit and the quantized one.
        change: returns a changed clone.
        at_least: size of the effect, relative to the result without it.
        at_most: how far off it may be, relative to its size.
        how: arguments of `sample`.
    """
    theirs, ours = (effect(patcher, change(patcher), **how) for patcher in models)
    assert theirs.norm() > at_least * sample(models[0], **how).norm()
    off = distance(ours, theirs)
    assert off < at_most, f"the effect is off by {off:.2f} of its size"


def patched(patcher: ModelPatcher, file: dict[str, Tensor], strength: float = 1.0) -> ModelPatcher:
    """Return a clone with a LoRA, as the LoRA loader node makes it."""
    return comfy.sd.load_lora_for_models(patcher, None, file, strength, 0.0)[0]


def load(patcher: ModelPatcher) -> ModelPatcher:
    """Load a model as sampling does."""
    comfy.model_management.load_models_gpu([patcher])
    return patcher


def predicted(patcher: ModelPatcher) -> torch.Tensor:
    """Return the diffusion model's output, with its weights wherever they are."""
    device = patcher.load_device
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, 16, 16, generator=generator).to(device)
    context = torch.randn(2, 77, 64, generator=generator).to(device)
    vector = torch.randn(2, 2816, generator=generator).to(device)
    sigma = torch.tensor([7.0, 7.0], device=device)
    return patcher.model.apply_model(latent, sigma, c_crossattn=context, y=vector).cpu()


def load_partly(patcher: ModelPatcher, share: float = 0.5) -> ModelPatcher:
    """Load a model as load_models_gpu does where the GPU has room for only a share of it."""
    loaded = comfy.model_management.LoadedModel(patcher)
    loaded.model_load(share * patcher.model_size())
    comfy.model_management.current_loaded_models.insert(0, loaded)
    return patcher


def unload() -> None:
    """Do what POST /free does: unload all models, outside of inference mode."""
    with torch.inference_mode(False):
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()


def built_in_place(patch: pytest.MonkeyPatch) -> None:
    """Let ComfyUI build and load models where they sample, as with --highvram on a GPU.

    A CPU with a number is another device than the host, of which ComfyUI has no number.
    """
    device = comfy.model_management.get_torch_device()
    place = torch.device("cpu", 0) if device.type == "cpu" else device
    patch.setattr(comfy.model_management, "unet_inital_load_device", lambda *_: place)


def parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return what a tensor is held in: itself, or bytes and their scale."""
    if isinstance(tensor, QuantizedTensor):
        return tensor._qdata, tensor._params.scale
    return (tensor,)


def held(patcher: ModelPatcher) -> dict[str, tuple[Tensor, ...]]:
    """Return a copy of all that a model's weights are held in, as they are now."""
    with torch.inference_mode():
        return {
            name: tuple(part.to("cpu", copy=True) for part in parts(parameter))
            for name, parameter in patcher.model.diffusion_model.named_parameters()
        }


def same(a: dict[str, tuple[Tensor, ...]], b: dict[str, tuple[Tensor, ...]]) -> list[str]:
    """Return the names of the weights that differ in a byte, a dtype or a shape."""
    return [
        name
        for name in a.keys() | b.keys()
        if name not in a or name not in b or not all(map(_identical, a[name], b[name]))
        or len(a[name]) != len(b[name])
    ]  # fmt: skip


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and _bytes(a).equal(_bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def weight(patcher: ModelPatcher, layer: str) -> Tensor:
    """Return a layer's weight as it is now, in real units and FP32, on the CPU."""
    value = comfy.utils.get_attr(patcher.model.diffusion_model, f"{layer}.weight")
    data, *scale = (part.to("cpu", copy=True) for part in parts(value))
    return dequantize(data, scale[0], torch.float32) if scale else data.float()


def streamed(patcher: ModelPatcher) -> int:
    """Return the bytes of the layers that ComfyUI streams to the device in each step."""
    return sum(
        comfy.model_management.module_size(module)
        for module in patcher.model.modules()
        if hasattr(module, "prev_comfy_cast_weights")
    )


def assert_frees_what_is_asked(patcher: ModelPatcher) -> None:
    """Check that so much leaves the device as a VAE asks for, and little more.

    ComfyUI goes by the sizes that a model says it has. It frees room for its buffers as well.
    """
    loaded = comfy.model_management.LoadedModel(load_partly(patcher, 2))
    size = patcher.model_size()
    exact = sum(part.nbytes for all_of_it in held(patcher).values() for part in all_of_it)
    assert exact <= size * 1.02
    assert patcher.loaded_size() == size
    largest = max(entry[0] for entry in patcher._load_list())  # bytes, cast if it must be
    for asked in (0.1 * size, 0.4 * size):
        before = patcher.loaded_size()
        assert not loaded.model_unload(asked)  # not all of it
        freed = before - patcher.loaded_size()
        buffers = (comfy.model_management.NUM_STREAMS + 1) * largest
        assert asked <= freed <= asked + buffers + largest, (asked, freed, largest)
        assert streamed(patcher) == size - patcher.loaded_size()
