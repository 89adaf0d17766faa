"""Sampling as the KSampler node does it, for jobs that compare models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import comfy.model_management as memory
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher

_RATIOS = "downscale_ratio_spacial", "downscale_ratio_temporal"
"""Keys of an empty LATENT that give its size, as ComfyUI spells them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """The inputs of a KSampler node, except model and seed.

    Attributes:
        positive, negative: conditionings, as ComfyUI's nodes have them.
        latent: ComfyUI's LATENT to begin from.
        steps, cfg, sampler, scheduler, denoise: as KSampler has them.
    """

    positive: list
    negative: list
    latent: dict
    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    scheduler: str = "normal"
    denoise: float = 1.0

    def sample(
        self,
        patcher: ModelPatcher,
        seed: int,
        after_step: Callable[[], None] = lambda: None,
        last_step: int | None = None,
    ) -> torch.Tensor:
        """Return the latents (batch, channels, ...) of one seed, on the intermediate device.

        Args:
            patcher: MODEL to sample with.
            seed: of the noise.
            after_step: is called after each step.
            last_step: step after which sampling ends; None samples to the end.
        """

        def callback(*_) -> None:
            memory.throw_exception_if_processing_interrupted()
            after_step()

        samples = comfy.sample.fix_empty_latent_channels(
            patcher,
            self.latent["samples"],
            *(self.latent[key] for key in _RATIOS if key in self.latent),
        )
        noise = comfy.sample.prepare_noise(samples, seed, self.latent.get("batch_index"))
        return comfy.sample.sample(
            patcher, noise, self.steps, self.cfg, self.sampler, self.scheduler,
            self.positive, self.negative, samples,
            denoise=self.denoise, last_step=last_step, noise_mask=self.latent.get("noise_mask"),
            callback=callback, disable_pbar=True, seed=seed,
        )  # fmt: skip
