"""The toy VAE: TAESD, whose weights are constructed instead of trained.

The decoder is ComfyUI's latent preview (`latent_rgb_factors` of SDXL), each latent pixel an 8x8
square. The encoder is its inverse: the mean colour of each 8x8 square, as the shortest latent that
the decoder shows in that colour. TAESD's residual blocks are idle, so three of its 64 channels do
all the work.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

LATENT_SCALE = 0.13025  # SDXL's, between the VAE's latents and the UNet's
RGB_FACTORS = torch.tensor(  # (latent channel, colour), for colours from -1 to 1
    [
        [0.3651, 0.4232, 0.4341],
        [-0.2533, -0.0042, 0.1068],
        [0.1076, 0.1111, -0.0362],
        [-0.3165, -0.2492, -0.2188],
    ]
)
RGB_BIAS = torch.tensor([0.1084, -0.0175, -0.0011])
# TAESD squeezes latents by 3 tanh(x / 3). That far below 3, it leaves them as they are.
SHRINK = 1 / 64
WIDTH = 64

ENCODER_BLOCKS = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
ENCODER_HALVINGS = (2, 6, 10)
DECODER_BLOCKS = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)
DECODER_DOUBLINGS = (7, 12, 17)


def _conv(outputs: int, inputs: int, matrix: Tensor | None = None) -> Tensor:
    """A 3x3 convolution that applies `matrix` (out, in) to each pixel, and gives 0 elsewhere."""
    weight = torch.zeros(outputs, inputs, 3, 3)
    if matrix is not None:
        weight[: matrix.shape[0], : matrix.shape[1], 1, 1] = matrix
    return weight


def _halving() -> Tensor:
    """With stride 2 and padding 1, the mean of each 2x2 square."""
    weight = _conv(WIDTH, WIDTH)
    weight[range(3), range(3), 1:, 1:] = 0.25
    return weight


def _idle_block(name: str) -> Iterator[tuple[str, Tensor]]:
    for layer in (0, 2, 4):
        yield f"{name}.conv.{layer}.weight", _conv(WIDTH, WIDTH)
        yield f"{name}.conv.{layer}.bias", torch.zeros(WIDTH)


def _padded(bias: Tensor) -> Tensor:
    return torch.cat([bias, torch.zeros(WIDTH - len(bias))])


def _encoder() -> Iterator[tuple[str, Tensor]]:
    """Colours from 0 to 1 in, shrunk latents out."""
    colours_to_latent = SHRINK * torch.linalg.pinv(RGB_FACTORS.T)  # (4, 3)
    yield "0.weight", _conv(WIDTH, 3, torch.eye(3))
    yield "0.bias", torch.zeros(WIDTH)
    for layer in ENCODER_BLOCKS:
        yield from _idle_block(str(layer))
    for layer in ENCODER_HALVINGS:
        yield f"{layer}.weight", _halving()
    yield "14.weight", _conv(4, WIDTH, 2 * colours_to_latent)
    yield "14.bias", -colours_to_latent @ (RGB_BIAS + 1)


def _decoder() -> Iterator[tuple[str, Tensor]]:
    """Shrunk latents in, colours from 0 to 1 out; its ReLUs cut only what the VAE cuts anyway."""
    yield "1.weight", _conv(WIDTH, 4, RGB_FACTORS.T / 2 / SHRINK)
    yield "1.bias", _padded((RGB_BIAS + 1) / 2)
    for layer in DECODER_BLOCKS:
        yield from _idle_block(str(layer))
    for layer in DECODER_DOUBLINGS:
        yield f"{layer}.weight", _conv(WIDTH, WIDTH, torch.eye(3))
    yield "19.weight", _conv(3, WIDTH, torch.eye(3))
    yield "19.bias", torch.zeros(3)


def vae_tensors() -> dict[str, Tensor]:
    """The VAE in FP32, names relative to `first_stage_model`."""
    vae = {f"taesd_encoder.{name}": value for name, value in _encoder()}
    vae |= {f"taesd_decoder.{name}": value for name, value in _decoder()}
    vae["vae_scale"] = torch.tensor(LATENT_SCALE * SHRINK)
    vae["vae_shift"] = torch.tensor(0.0)
    return vae
