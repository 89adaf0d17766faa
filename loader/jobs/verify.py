"""Checking, seed by seed, whether a quantized model makes the same pictures as the original."""

from __future__ import annotations

import dataclasses
import heapq
import statistics
from collections.abc import Iterator, Sequence

import comfy.model_management as memory
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE

from .sampling import Picture

SAME = 0.95
"""Cosine of two latents above which HSWQ's author calls pictures the same."""

_EXACT_DB = 100.0  # PSNR of equal pictures, which would be infinite
_GREY = 0.5
_ROW_PIXELS = 256  # height of a picture on the contact sheet
_GAP_PIXELS = 4
_MAX_ROWS = 60  # of the contact sheet: browsers show no picture of more than 16,384 pixels
_HELD_BYTES = 256 << 20  # of latents that wait for the other model's: 500 of 1024 x 1024 pixels


@dataclasses.dataclass(frozen=True)
class Pair:
    """The pictures of both models for one seed.

    Attributes:
        seed: of the noise.
        cosine: of the latents; 1 if they have the same direction, 0 if one is not finite.
        psnr: of the pictures in dB, at most 100; 0 if one is not finite.
    """

    seed: int
    cosine: float
    psnr: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of comparing two models.

    Attributes:
        pairs: in the order of the seeds.
        threshold: cosine from which a picture counts as the same.
    """

    pairs: Sequence[Pair]
    threshold: float = SAME

    @property
    def same(self) -> int:
        """How many pictures are the same."""
        return sum(pair.cosine >= self.threshold for pair in self.pairs)

    @property
    def cosine(self) -> float:
        """Mean cosine of the latents."""
        return statistics.mean(pair.cosine for pair in self.pairs)

    @property
    def psnr(self) -> float:
        """Mean PSNR in dB."""
        return statistics.mean(pair.psnr for pair in self.pairs)

    @property
    def worst(self) -> Pair:
        """The pair whose latents differ most."""
        return min(self.pairs, key=lambda pair: pair.cosine)

    def to_json(self) -> dict:
        """Return what the panel shows of it."""
        return {
            "same": self.same,
            "pictures": len(self.pairs),
            "threshold": self.threshold,
            "cosine": self.cosine,
            "psnr": self.psnr,
            "worst": dataclasses.asdict(self.worst),
        }

    def __str__(self) -> str:
        worst = self.worst
        return (
            f"{self.same} of {len(self.pairs)} pictures are the same (latent cosine of "
            f"{self.threshold:g} or more): cosine {self.cosine:.4f}, PSNR {self.psnr:.1f} dB; "
            f"worst seed {worst.seed}: {worst.cosine:.4f}, {worst.psnr:.1f} dB"
        )


def verify(
    models: tuple[ModelPatcher, ModelPatcher],
    vae: VAE,
    picture: Picture,
    seeds: Sequence[int],
    *,
    threshold: float = SAME,
    amplify: float = 4.0,
) -> tuple[Verdict, torch.Tensor]:
    """Sample seeds with both models, one model after the other, and compare the pictures.

    If there are so many seeds that their latents would take too much memory, they are sampled in
    several rounds.

    Args:
        models: the 16-bit one and the quantized one.
        vae: decodes the latents.
        picture: what to sample. Each picture of a batch is compared, with the seed of the batch.
        seeds: of the noise; at least one.
        threshold: see Verdict.
        amplify: the contact sheet shows differences times this.

    Returns:
        The Verdict; and the contact sheet, an IMAGE (1, height, width, 3) FP32 from 0 to 1. It has
        a row for each picture, the worst first and at most 60, with the 16-bit model's picture, the
        quantized model's, and their difference on grey.

    Raises:
        ValueError: there are no seeds.
    """
    if not seeds:
        raise ValueError("there are no seeds to compare")
    # Each step and each decoded picture counts 1, over both models.
    progress = comfy.utils.ProgressBar(2 * len(seeds) * (picture.steps + 1))
    pairs: list[Pair] = []
    worst: list[tuple[float, int, torch.Tensor]] = []  # a heap: the most alike comes first
    for seed, *latents in _sampled(models, picture, seeds, progress):
        memory.throw_exception_if_processing_interrupted()
        decoded = [_decoded(vae, latent) for latent in latents]
        progress.update(2)
        for original, found, *images in zip(*latents, *decoded, strict=True):
            pair = Pair(seed, _cosine(original, found), _psnr(*images))
            add = heapq.heappush if len(worst) < _MAX_ROWS else heapq.heappushpop
            add(worst, (-pair.cosine, -len(pairs), _row(*images, amplify)))
            pairs.append(pair)
    return Verdict(pairs, threshold), _sheet([row for *_, row in sorted(worst, reverse=True)])


def _sampled(
    models: Sequence[ModelPatcher],
    picture: Picture,
    seeds: Sequence[int],
    progress: comfy.utils.ProgressBar,
) -> Iterator[tuple]:
    """Yield each seed with the latents of every model, on the CPU."""

    def sampled(patcher: ModelPatcher, some: Sequence[int]) -> Iterator[torch.Tensor]:
        for seed in some:
            memory.throw_exception_if_processing_interrupted()
            yield picture.sample(patcher, seed, lambda: progress.update(1)).cpu()

    count = max(1, _HELD_BYTES // (len(models) * picture.latent["samples"].nbytes))
    for first in range(0, len(seeds), count):
        some = seeds[first : first + count]
        latents = [list(sampled(patcher, some)) for patcher in models]
        while latents[0]:  # they are taken out, so that no pair is held longer than needed
            yield some[-len(latents[0])], *(its.pop(0) for its in latents)


def _decoded(vae: VAE, latent: torch.Tensor) -> torch.Tensor:
    """Return pictures (batch, height, width, 3); for a video, its first frame."""
    images = vae.decode(latent).to("cpu", torch.float32)
    return images[:, 0] if images.ndim == 5 else images


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    pair = (latent.flatten().to(torch.float64) for latent in (one, other))
    return _finite(torch.nn.functional.cosine_similarity(*pair, dim=0))


def _psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    error = (one - other).square().mean(dtype=torch.float64)
    return _finite((-10 * error.log10()).clamp(max=_EXACT_DB))


def _finite(likeness: torch.Tensor) -> float:
    """Return a number; 0, which is no likeness at all, for pictures that are not finite."""
    return torch.nan_to_num(likeness, nan=0.0, neginf=0.0).item()


def _row(original: torch.Tensor, found: torch.Tensor, amplify: float) -> torch.Tensor:
    """Return two pictures (height, width, 3) and their difference, side by side."""
    difference = (_GREY + amplify * (found - original)).clamp(0, 1)
    pictures = torch.stack([original, found, difference])[..., :3].movedim(-1, 1).nan_to_num()
    height, width = pictures.shape[2:]
    scale = min(1.0, _ROW_PIXELS / height)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    shown = torch.nn.functional.interpolate(pictures, size, mode="area")
    padded = torch.nn.functional.pad(shown, (0, _GAP_PIXELS, 0, _GAP_PIXELS), value=1.0)
    return torch.cat(list(padded.movedim(1, -1)), dim=1)


def _sheet(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(rows), dim=0)[None]
