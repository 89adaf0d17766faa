"""Several draws as a row of means and deviations, and rows as a table in Markdown."""

from __future__ import annotations

import statistics

_COLUMNS = {
    "MB": "{:.2f}",
    "kept": "{:.2%}",
    "PSNR": "{:.1f}",
    "PSNR worst": "{:.1f}",
    "SSIM": "{:.4f}",
    "SSIM worst": "{:.3f}",
    "latent error": "{:.2%}",
    "layer error": "{:.3%}",
}
_BY_CHANCE = list(_COLUMNS)[2:]
DEVIATION = " ±"
"""Ends the name of a figure's standard deviation."""


def row_of(draws: list[dict[str, float]]) -> dict[str, float]:
    """Return each figure's mean, and its standard deviation where there are several draws."""
    row: dict[str, float] = {}
    for key in draws[0]:
        values = [one[key] for one in draws]
        row[key] = round(statistics.mean(values), 6)
        if len(values) > 1 and key in _BY_CHANCE:
            row[key + DEVIATION] = round(statistics.stdev(values), 6)
    return row


def markdown(results: dict[str, dict[str, float]]) -> str:
    """Return the table, a row each."""
    lines = [f"| | {' | '.join(_COLUMNS)} |", f"| --- |{' --- |' * len(_COLUMNS)}"]
    lines += [f"| {name} | {' | '.join(_cells(row))} |" for name, row in results.items()]
    return "\n".join(lines)


def _cells(row: dict[str, float]) -> list[str]:
    cells = []
    for key, form in _COLUMNS.items():
        deviation = row.get(key + DEVIATION)
        more = "" if deviation is None else f" ± {form.format(deviation)}"
        cells.append(form.format(row[key]) + more)
    return cells
