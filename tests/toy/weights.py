"""Values of the toy checkpoint: random, but not arbitrary.

- Heavy tails, a few outlier channels and a scale of its own in every layer, as in trained models,
  so that sensitivity, importance and the choice of amax differ clearly from layer to layer.
- The UNet predicts mostly its own input, as a denoiser does, so that the noise goes away while
  sampling, and what is left is the network's own contribution: blotches of colour that depend on
  the prompt, the seed and a little on every layer.
- Small errors stay small, as in trained models: attention is soft and residuals are modest. With
  larger ones the picture would say nothing about a quantization, being another one each time.
"""

import math
import zlib

import torch
from torch import Tensor

from toy.shapes import CHANNELS, clip_g_shapes, clip_l_shapes, unet_shapes

CLIP_L_PREFIX = "conditioner.embedders.0.transformer.text_model."
CLIP_G_PREFIX = "conditioner.embedders.1.model."

TAIL = 4  # degrees of freedom of the Student t distribution
SPREAD = 0.4  # standard deviation of the logarithm of a layer's scale, and of a norm's weights
OUTLIERS = 0.02  # share of input channels, at least one
OUTLIER_GAIN = 4.0
# By the end of the name, the first that fits. Layers that add to a residual are small, so that
# activations do not grow with depth, except for the one that brings in the prompt.
GAINS = {
    "attn2.to_out.0.weight": 1.4,
    "to_out.0.weight": 0.7,
    "attn1.to_q.weight": 0.8,
    "attn1.to_k.weight": 0.8,
    "ff.net.2.weight": 0.7,
    "proj_out.weight": 0.7,
    "out_layers.3.weight": 0.5,
    "out_proj.weight": 0.7,
    "fc2.weight": 0.5,
    "c_proj.weight": 0.5,
}

# The way of the UNet's input to its output: see _pass_input_to_output.
PASSED = 8  # channels
PREDICTED = 1.02  # share of the noise that it takes away
LEAK = 0.01  # random weights in it, so that no row is exact
# Beside it, what the network adds of its own.
OWN = 0.065
SHALLOW = 0.1  # share of skip connections on the way up: less of them makes larger blotches
# Of the channels that these output blocks get, so many come from below, the rest over the skip.
DEEP_CHANNELS = {3: 128, 4: 64, 5: 64, 6: 64, 7: 32, 8: 32}
SMOOTH = 0.8  # share of the last convolution's weights that is the same in its nine places


def _student_t(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Student's t of variance 1; torch's own takes no generator."""
    normal = torch.randn(shape, generator=generator)
    chi2 = torch.randn((TAIL, *shape), generator=generator).square().sum(0)
    return normal / (chi2 / (TAIL - 2)).sqrt()


def _matrix(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A Linear or Conv2d weight (out, in, ...) with outlier input channels."""
    weight = _student_t(shape, generator)
    outliers = math.ceil(OUTLIERS * shape[1])
    channels = torch.randperm(shape[1], generator=generator)[:outliers]
    weight[:, channels] *= OUTLIER_GAIN
    gain = next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0)
    gain *= math.exp(SPREAD * torch.randn((), generator=generator).item())
    return weight * (gain / math.sqrt(weight[0].numel()) / weight.std())


def value_of(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """FP32. It depends on the seed and the name only, not on what else is in the file."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if "token_embedding" in name:
        return 0.5 * torch.randn(shape, generator=generator)
    if "position" in name:
        return 0.1 * torch.randn(shape, generator=generator)
    if name == "text_projection":  # stored (in, out)
        return _student_t(shape, generator) / math.sqrt(shape[0])
    if len(shape) > 1:
        return _matrix(name, shape, generator)
    if name.endswith("bias"):
        return 0.1 * _student_t(shape, generator)
    return torch.exp(SPREAD * torch.randn(shape, generator=generator))  # a norm's weight


def _pass_input_to_output(unet: dict[str, Tensor]) -> None:
    """Eight channels of the first convolution hold the latent and its negative, the last skip
    connection passes them on, a norm gives them the variance of noise, and the last convolution
    takes their difference: silu(x) - silu(-x) is x again.

    PREDICTED is in the norm, so that the ones stay exact in a plain FP8 cast: an error of 2% there
    would drown all others.
    """
    latent = torch.cat([torch.eye(4), -torch.eye(4)])  # (8, 4)
    first, last = unet["input_blocks.0.0.weight"], unet["out.2.weight"]
    skip = unet["output_blocks.8.0.skip_connection.weight"]
    for rows in (first, skip, unet["output_blocks.8.0.out_layers.3.weight"]):
        rows[:PASSED] *= LEAK
    last[:, :PASSED] *= LEAK
    first[:PASSED, :, 1, 1] += latent
    skip[:PASSED, CHANNELS : CHANNELS + PASSED, 0, 0] += torch.eye(PASSED)
    last[:, :PASSED, 1, 1] += latent.T
    for layer in ("input_blocks.0.0", "output_blocks.8.0.skip_connection", "out.0"):
        unet[f"{layer}.bias"][:PASSED] = 0
    unet["output_blocks.8.0.out_layers.3.bias"][:PASSED] = 0
    unet["out.0.weight"][:PASSED] = PREDICTED


def _add_own_contribution(unet: dict[str, Tensor]) -> None:
    """In the other channels of the last convolution: smooth, small and without a mean colour."""
    last = unet["out.2.weight"][:, PASSED:]
    same = 3 * last.mean((2, 3), keepdim=True)  # a mean of nine has a third of the deviation
    last.copy_(OWN * (SMOOTH * same + (1 - SMOOTH) * last))
    unet["out.2.bias"].copy_(-last.sum((2, 3)) @ _mean_input(unet)[PASSED:])


def _mean_input(unet: dict[str, Tensor]) -> Tensor:
    """The last convolution's mean input, (channels,): of silu(weight * normal + bias)."""
    normal = torch.linspace(-0.999, 0.999, 1000).erfinv() * math.sqrt(2)
    weight, bias = unet["out.0.weight"][:, None], unet["out.0.bias"][:, None]
    return torch.nn.functional.silu(weight * normal + bias).mean(1)


def _prefer_depth(unet: dict[str, Tensor]) -> None:
    """On the way up, from the first block that has a larger picture than the deepest."""
    for block, deep in DEEP_CHANNELS.items():
        layer = f"output_blocks.{block}.0"
        unet[f"{layer}.in_layers.0.weight"][deep:] *= SHALLOW
        unet[f"{layer}.skip_connection.weight"][:, deep:] *= SHALLOW


def unet_tensors(seed: int = 0) -> dict[str, Tensor]:
    """The UNet in FP32, names relative to the diffusion model."""
    unet = {name: value_of(name, shape, seed) for name, shape in unet_shapes()}
    _prefer_depth(unet)
    _pass_input_to_output(unet)
    _add_own_contribution(unet)
    return unet


def clip_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Both text encoders in FP32 (but for the one integer that SDXL has), named as in the file."""
    clip = {CLIP_L_PREFIX + name: value_of(name, shape, seed) for name, shape in clip_l_shapes()}
    clip |= {CLIP_G_PREFIX + name: value_of(name, shape, seed) for name, shape in clip_g_shapes()}
    clip[CLIP_L_PREFIX + "embeddings.position_ids"] = torch.arange(77)[None]
    clip[CLIP_G_PREFIX + "logit_scale"] = torch.tensor(4.6055)
    return clip
