"""What the trained toy learns: prompts, and pictures that they describe.

One flat shape on a softly shaded background. Prompts name shape, colour, place and background;
size, exact place and shading are the noise's to choose.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from toy.vae import RGB_BIAS, RGB_FACTORS

EDGE = 24  # latent pixels, which the toy's VAE shows as 192

# Muted, because saturated colours lie far out in SDXL's latents.
COLOURS = {
    "red": (0.75, 0.30, 0.30),
    "yellow": (0.85, 0.75, 0.40),
    "green": (0.35, 0.60, 0.40),
    "blue": (0.25, 0.40, 0.75),
    "white": (0.92, 0.92, 0.92),
    "black": (0.08, 0.08, 0.08),
}
BACKGROUNDS = {"grey": (0.50, 0.50, 0.50), "sand": (0.75, 0.68, 0.60), "navy": (0.20, 0.25, 0.36)}
PLACES = {  # of the centre, from -1 to 1, right and down
    "top left": (-0.4, -0.4),
    "top right": (0.4, -0.4),
    "centre": (0.0, 0.0),
    "bottom left": (-0.4, 0.4),
    "bottom right": (0.4, 0.4),
}
RADIUS = (0.32, 0.46)
JITTER = 0.06  # of the centre
SHADING = 0.10  # largest deviation of a background's brightness


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.85


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = math.sqrt(5) / 2
    return torch.maximum(y - 0.85, (2 * x.abs() - y - 0.95) / (2 * slope))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.72).abs() - 0.28


# Each takes (B, EDGE, EDGE) places in units of the radius, and is negative inside.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
}


class Subject(NamedTuple):
    """What one prompt asks for; every field is a key of its dictionary above."""

    shape: str
    colour: str
    place: str
    background: str

    @property
    def prompt(self) -> str:
        """In words, as many for each subject but for the place's."""
        return f"a {self.colour} {self.shape} at the {self.place} on {self.background}"


SUBJECTS = [
    Subject(shape, colour, place, background)
    for shape in SHAPES
    for colour in COLOURS
    for place in PLACES
    for background in BACKGROUNDS
]


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _background(subjects: list[Subject], grid: Tensor, generator: torch.Generator) -> Tensor:
    """The background's colour, lighter towards a random side: (B, 3, EDGE, EDGE)."""
    colour = torch.tensor([BACKGROUNDS[subject.background] for subject in subjects])
    angle = _uniform(0, 2 * math.pi, (len(subjects), 1, 1), generator)
    light = angle.cos() * grid[None, None, :] + angle.sin() * grid[None, :, None]
    return colour[:, :, None, None] + SHADING * light[:, None]


def draw(subjects: list[Subject], generator: torch.Generator) -> Tensor:
    """Pictures of the subjects with random sizes, places and shadings.

    Returns (B, 3, EDGE, EDGE) FP32, colours from 0 to 1, edges smooth over a pixel.
    """
    batch = len(subjects)
    grid = (torch.arange(EDGE) + 0.5) * (2 / EDGE) - 1
    picture = _background(subjects, grid, generator)
    centre = torch.tensor([PLACES[subject.place] for subject in subjects])
    centre = centre + _uniform(-JITTER, JITTER, (batch, 2), generator)
    radius = _uniform(*RADIUS, (batch, 1, 1), generator)
    x, y = torch.broadcast_tensors(
        (grid[None, None, :] - centre[:, 0, None, None]) / radius,
        (grid[None, :, None] - centre[:, 1, None, None]) / radius,
    )
    outside = torch.stack([SHAPES[subject.shape](x[i], y[i]) for i, subject in enumerate(subjects)])
    cover = (0.5 - outside * radius * (EDGE / 2)).clamp(0, 1)[:, None]
    colour = torch.tensor([COLOURS[subject.colour] for subject in subjects])[:, :, None, None]
    return picture + cover * (colour - picture)


def to_latent(picture: Tensor) -> Tensor:
    """Colours (B, 3, H, W) as the shortest latents that ComfyUI's preview shows in them.

    Returns (B, 4, H, W) latents as the UNet has them.
    """
    colours = (2 * picture - 1).movedim(1, -1) - RGB_BIAS
    return (colours @ torch.linalg.pinv(RGB_FACTORS)).movedim(-1, 1)


def to_picture(latent: Tensor) -> Tensor:
    """Back from latents (B, 4, H, W) to colours (B, 3, H, W), cut to 0 and 1."""
    colours = latent.movedim(1, -1) @ RGB_FACTORS + RGB_BIAS
    return ((colours + 1) / 2).clamp(0, 1).movedim(-1, 1)
