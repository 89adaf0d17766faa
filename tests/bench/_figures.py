"""The fidelity benchmark's sheet of pictures."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from _methods import DEFAULT, PUBLISHED, SMALL, STOCK
from PIL import Image

matplotlib.use("Agg")

import matplotlib.pyplot as plt

SHOWN = ("16 bit", STOCK, PUBLISHED, DEFAULT, SMALL)
AMPLIFIED = 4
GREY = 0.5
BELOW = f"\n\nRight: difference\nfrom 16 bit, {AMPLIFIED} times;\ngrey is none"


def sheet(
    pictures: dict[str, list[np.ndarray]], similarities: dict[str, list[float]], path: Path
) -> None:
    """Write some pictures by some variants, below each its difference from 16 bit.

    Chosen by their SSIM: the worst of the stock cast, its median, and the worst of the loader's
    default.
    """
    numbers = chosen_pictures(similarities)
    figure, axes = plt.subplots(
        2 * len(numbers), len(SHOWN), figsize=(2 * len(SHOWN), 4.2 * len(numbers)),
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    for column, name in enumerate(SHOWN):
        axes[0, column].set_title(name.replace(", ", "\n"), fontsize=9)
        for row, number in enumerate(numbers):
            _pair(axes[2 * row : 2 * row + 2, column], pictures, name, number)
    for row, why in enumerate(numbers.values()):
        axes[2 * row + 1, 0].text(0.5, 0.5, why + BELOW, ha="center", va="center", fontsize=9)
    _save(figure, path)


def chosen_pictures(similarities: dict[str, list[float]]) -> dict[int, str]:
    """Return which pictures to show, and why they were chosen."""
    stock = np.argsort(similarities[STOCK])
    ours = np.argsort(similarities[DEFAULT])
    found: dict[int, str] = {}
    for number, why in (
        (int(stock[0]), "Worst of the\nstock cast"),
        (int(stock[len(stock) // 2]), "Median of the\nstock cast"),
        (int(ours[0]), "Worst of the\nloader's default"),
    ):
        found[number] = f"{found[number]}\nand {why.lower()}" if number in found else why
    return found


def _save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG of 256 colours, which takes a third."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)


def _pair(axes: np.ndarray, pictures: dict[str, list[np.ndarray]], name: str, number: int) -> None:
    original, picture = pictures["16 bit"][number], pictures[name][number]
    axes[0].imshow(picture.clip(0, 1), interpolation="bicubic")
    if name != "16 bit":
        difference = GREY + AMPLIFIED * (picture - original)
        axes[1].imshow(difference.clip(0, 1), interpolation="bicubic")
