"""What a node's line says of the toy's layers."""

from __future__ import annotations

import re

QUARTER_KEPT = ((198, 66), (197, 67), (196, 68))
"""Layers in FP8 and in 16 bit by the defaults: a quarter is kept, the first and the last too.

Whether those two are of the quarter, the recorded images decide.
"""


def layers_told(line: str) -> tuple[int, int] | None:
    """Return how many layers a line says are in FP8 and in 16 bit; None where it does not say."""
    found = re.search(r"(\d+) layers FP8, (\d+) in 16 bit", line)
    return found and (int(found[1]), int(found[2]))


def sentence(outcome: dict) -> str:
    """Return what panel and nodes should say of an outcome, as the server's JSON has it."""
    error, exact = outcome["error"], outcome["exact"]
    parts = ["{:.2f} → {:.2f} MiB".format(*(outcome[key] / 2**20 for key in ("before", "after")))]
    if error is not None:
        parts.append(f"error {'' if exact else 'about '}{100 * error:.1f}%")
    return ", ".join((*parts, f"{outcome['samples']} images", outcome["title"]))
