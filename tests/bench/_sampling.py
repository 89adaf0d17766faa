"""Pictures of the same seeds and prompts by several models, and how alike they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import comfy.sample
import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

EXACT = 100.0
"""PSNR in dB of equal pictures, whose ratio would be infinite, and at most of any."""


class Latents(NamedTuple):
    """What to sample: as many prompts and seeds as pictures."""

    prompts: Sequence[str]
    seeds: Sequence[int]


class How(NamedTuple):
    """Settings of sampling: pixels each way, pictures at once, and the KSampler node's."""

    size: int
    steps: int
    cfg: float
    batch: int
    sampler: str = "euler"
    scheduler: str = "normal"


class Sampler:
    """Samples as the KSampler node does, some pictures at a time."""

    def __init__(self, clip, vae, how: How) -> None:
        """Take the text encoder, the VAE and the settings."""
        self._clip, self._vae, self._how = clip, vae, how

    def encode(self, prompts: Sequence[str]) -> list:
        """Return a conditioning of several prompts."""
        tokens = [self._clip.tokenize(prompt) for prompt in prompts]
        encoded = [self._clip.encode_from_tokens(each, return_pooled=True) for each in tokens]
        context, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        return [[context, {"pooled_output": pooled}]]

    def sample(self, patcher, wanted: Latents) -> Tensor:
        """Return the latents (pictures, 4, height, width) that a model makes."""
        made, how, edge = [], self._how, self._how.size // 8
        for start in range(0, len(wanted.seeds), how.batch):
            part = slice(start, start + how.batch)
            prompts, seeds = wanted.prompts[part], wanted.seeds[part]
            empty = torch.zeros(1, 4, edge, edge)
            noise = torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds])
            made.append(
                comfy.sample.sample(
                    patcher, noise, how.steps, how.cfg, how.sampler, how.scheduler,
                    self.encode(prompts), self.encode([""] * len(prompts)),
                    torch.zeros_like(noise), disable_pbar=True,
                )
            )  # fmt: skip
        return torch.cat(made)

    def pictures(self, latents: Tensor, every: int) -> list[np.ndarray]:
        """Return FP32 pictures (height, width, 3) from 0 to 1, of every so many pixels one."""
        decoded = (self._vae.decode(latent[None])[0] for latent in latents)
        return [one[::every, ::every].float().cpu().numpy() for one in decoded]


def similarities(found: list[np.ndarray], original: list[np.ndarray]) -> list[float]:
    """Return SSIM picture by picture, with the window of its authors, over all pixels.

    scikit-image's own mean leaves out five at every edge, most of a picture as small as the toy's.
    """
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
    return [
        float(structural_similarity(*pair, data_range=1.0, channel_axis=-1, **how)[1].mean())
        for pair in _pairs(original, found)
    ]


def noise_ratios(found: list[np.ndarray], original: list[np.ndarray]) -> list[float]:
    """Return PSNR in dB picture by picture, at most EXACT."""
    least = 10 ** (-EXACT / 10)
    errors = (float(np.square(a - b).mean()) for a, b in _pairs(original, found))
    return [-10 * math.log10(max(error, least)) for error in errors]


def _pairs(original: list[np.ndarray], found: list[np.ndarray]) -> Iterator[tuple]:
    """Give both in float64, which scikit-image then computes in."""
    for pair in zip(original, found, strict=True):
        yield tuple(one.astype(np.float64) for one in pair)
