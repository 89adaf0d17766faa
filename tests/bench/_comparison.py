"""How far a quantized model is from the 16-bit one: its pictures, layers and bytes."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import numpy as np
from _layers import layer_errors, share_kept, unet_bytes
from _sampling import Latents, Sampler, noise_ratios, similarities
from comfy.model_patcher import ModelPatcher
from hswq.loader.engine.adopt import ATTACHMENT

OF_LAYERS = 2  # pictures whose layers' inputs are compared


class Measured(NamedTuple):
    """One draw.

    Attributes:
        figures: by name.
        pictures: that were compared.
        alike: SSIM of each.
    """

    figures: dict[str, float]
    pictures: list[np.ndarray]
    alike: list[float]


class Comparison:
    """Keeps the 16-bit model's pictures, and compares others with them.

    Attributes:
        pictures: of the 16-bit model.
    """

    def __init__(
        self, reference: ModelPatcher, sampler: Sampler, wanted: Latents, every: int
    ) -> None:
        """Sample the 16-bit model; `every` so many pixels one is compared."""
        self._reference, self._sampler, self._wanted, self._every = (
            reference, sampler, wanted, every,
        )  # fmt: skip
        self._latents = sampler.sample(reference, wanted)
        self.pictures = sampler.pictures(self._latents, every)

    def measure(self, patcher: ModelPatcher) -> Measured:
        """Sample another model with the same prompts and seeds."""
        latents = self._sampler.sample(patcher, self._wanted)
        pictures = self._sampler.pictures(latents, self._every)
        difference = (latents - self._latents).flatten(1).norm(dim=1)
        ratios, alike = (
            compare(pictures, self.pictures) for compare in (noise_ratios, similarities)
        )
        figures = {
            "MB": unet_bytes(patcher) / 1e6,
            "kept": self._kept(patcher),
            "PSNR": statistics.mean(ratios),
            "PSNR worst": min(ratios),
            "SSIM": statistics.mean(alike),
            "SSIM worst": min(alike),
            "latent error": (difference / self._latents.flatten(1).norm(dim=1)).median().item(),
            "layer error": self._layer_error(patcher),
        }
        return Measured(figures, pictures, alike)

    def _kept(self, patcher: ModelPatcher) -> float:
        plan = patcher.get_attachment(ATTACHMENT)
        return share_kept(self._reference, plan.kept if plan else [])

    def _layer_error(self, patcher: ModelPatcher) -> float:
        """Return the mean of all layers that are quantized: how well those are rounded."""
        few = Latents(*(part[:OF_LAYERS] for part in self._wanted))
        errors = layer_errors(
            self._reference, patcher, lambda: self._sampler.sample(self._reference, few)
        )
        plan = patcher.get_attachment(ATTACHMENT)
        names = errors if plan is None else plan.quantized
        return statistics.mean(errors[name] for name in names) if names else 0.0
