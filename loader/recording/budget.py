"""How many layers may be measured in each forward, by the user's budget."""

from __future__ import annotations

import torch

from ...calibration import kernels

SHARE_PER_PERCENT = 0.025
"""Share of the layers to measure in a forward, for each percent that it may take longer.

Measuring all layers of SDXL adds 39% to a GPU's kernel launches and 14% to its time, and 40% to a
CPU's time: 1 / 40 for each percent.
"""

SHARE_PER_PERCENT_WITHOUT_TRITON = 0.003
"""The same for a GPU without Triton, where measuring a layer takes nine launches and not one."""


def share_of(budget: float, device: torch.device) -> float:
    """Return the share of the layers to measure a forward.

    Args:
        budget: percent by which a step may take longer.
        device: that samples.
    """
    in_one_launch = device.type == "cpu" or kernels.usable(device)
    share = SHARE_PER_PERCENT if in_one_launch else SHARE_PER_PERCENT_WITHOUT_TRITON
    return min(1.0, budget * share)
