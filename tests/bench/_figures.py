"""The fidelity benchmark's table, plot and sheet of pictures."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from _variants import STOCK
from PIL import Image

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLUMNS = {
    "MB": "{:.3f}",
    "SSIM": "{:.4f}",
    "SSIM worst": "{:.4f}",
    "PSNR": "{:.1f}",
    "PSNR worst": "{:.1f}",
    "cosine": "{:.4f}",
    "cosine worst": "{:.4f}",
    "layer error": "{:.4f}",
    "layer error worst": "{:.4f}",
    "weighted MSE": "{:.1e}",
}
LINES = {"absmax": "tab:gray", "HSWQ compatible": "tab:orange", "HSWQ scaled": "tab:blue"}
SHOWN = (
    "FP16",
    STOCK,
    "HSWQ compatible, keep 0.25",
    "HSWQ scaled, keep 0",
    "HSWQ scaled, keep 0.25",
)
AMPLIFIED = 4
GREY = 0.5
BELOW = f"\n\nRight: difference\nfrom 16 bit, {AMPLIFIED} times;\ngrey is none"


def markdown(results: dict[str, dict]) -> str:
    """Return the table, a row each."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for name, row in results.items():
        cells = (form.format(row[key]) if key in row else "" for key, form in COLUMNS.items())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, dict], path: Path) -> None:
    """Write SSIM against bytes, of the mean and of the worst picture."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, column, title in zip(
        axes, ("SSIM", "SSIM worst"), ("mean picture", "worst picture"), strict=True
    ):
        for line, colour in LINES.items():
            rows = [row for name, row in results.items() if name.startswith(f"{line},")]
            points = [row["MB"] for row in rows], [row[column] for row in rows]
            axis.plot(*points, "o-", color=colour, label=f"{line}, keep 0 to 0.5")
        stock = results[STOCK]
        axis.plot(stock["MB"], stock[column], "X", color="tab:red", markersize=10, label=STOCK)
        axis.axvline(results["FP16"]["MB"], color="black", linestyle=":", label="size in 16 bit")
        axis.set(title=title, xlabel="UNet, MB", ylabel="SSIM with 16 bit")
        axis.grid(alpha=0.3)
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(LINES) + 2, fontsize=8)
    _save(figure, path)


def sheet(
    pictures: dict[str, list[np.ndarray]], similarities: dict[str, list[float]], path: Path
) -> None:
    """Write some pictures by some variants, below each its difference from 16 bit.

    Chosen by their SSIM: the worst of the stock cast, its median, and the worst of HSWQ scaled.
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
    ours = np.argsort(similarities["HSWQ scaled, keep 0"])
    found: dict[int, str] = {}
    for number, why in (
        (int(stock[0]), "Worst of the\nstock cast"),
        (int(stock[len(stock) // 2]), "Median of the\nstock cast"),
        (int(ours[0]), "Worst of\nHSWQ scaled, keep 0"),
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
    original, picture = pictures["FP16"][number], pictures[name][number]
    axes[0].imshow(picture.clip(0, 1), interpolation="bicubic")
    if name != "FP16":
        difference = GREY + AMPLIFIED * (picture - original)
        axes[1].imshow(difference.clip(0, 1), interpolation="bicubic")
