"""Pictures side by side, with their differences from the first below them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFont

EDGE = 320
GAP = 16
TITLE = 64
CAPTION = 40
BACKGROUND, TEXT, FAINT = (24, 24, 27), (244, 244, 245), (161, 161, 170)
LATENT_EDGE = 8  # pixels: the toy's VAE shows each latent pixel as a square


class Panel(NamedTuple):
    """A column: title, a line about it, and an RGB picture."""

    title: str
    about: str
    picture: Image.Image


def draw(panels: list[Panel], path: Path, amplified: int) -> None:
    """Write a PNG: the pictures in a row, below each its difference from the first one.

    Args:
        panels: the first one is the original.
        path: its folder is made if it is not there.
        amplified: what differences are multiplied by.
    """
    width = GAP + len(panels) * (EDGE + GAP)
    height = TITLE + EDGE + CAPTION + EDGE + GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for number, panel in enumerate(panels):
        left = GAP + number * (EDGE + GAP)
        _write(pen, (left, 10), panel.title, 22, TEXT)
        _write(pen, (left, 38), panel.about, 16, FAINT)
        sheet.paste(_smooth(panel.picture), (left, TITLE))
        if number:
            difference = _difference(panel.picture, panels[0].picture, amplified)
            sheet.paste(difference, (left, TITLE + EDGE + CAPTION))
    words = f"Difference from 16 bit,\n{amplified} times amplified:\ngrey is none."
    _write(pen, (GAP, TITLE + EDGE + CAPTION + EDGE // 2 - 40), words, 20, FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], words: str, size: int, colour) -> None:
    pen.text(place, words, colour, ImageFont.load_default(size))


def _smooth(picture: Image.Image) -> Image.Image:
    small = picture.reduce(LATENT_EDGE)
    return small.resize((EDGE, EDGE), Image.Resampling.BICUBIC)


def _difference(picture: Image.Image, original: Image.Image, amplified: int) -> Image.Image:
    """Grey where they are equal, lighter or darker in each colour where they are not."""
    more = ImageChops.subtract(picture, original).point(lambda value: value * amplified)
    less = ImageChops.subtract(original, picture).point(lambda value: value * amplified)
    grey = Image.new("RGB", picture.size, (128, 128, 128))
    return _smooth(ImageChops.subtract(ImageChops.add(grey, more), less))
