"""What several nodes share: their inputs, and the line of text that they show."""

from __future__ import annotations

from comfy_api.latest import io
from server import PromptServer

from ...quant import FP8_PLAIN, FP8_SCALED, NUMBER_FORMATS, Plan
from ..jobs import choice

CATEGORY = "HSWQ"
SCALED, COMPATIBLE = FP8_SCALED.name, FP8_PLAIN.name


def keep_ratio_input() -> io.Float.Input:
    """Return the keep_ratio input."""
    return io.Float.Input(
        "keep_ratio",
        default=0.25,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Share of the measured layers, the most sensitive ones, that keep their 16-bit "
        "weights. 0.25 is the recommendation; less saves memory, more is closer to the original.",
    )


def mode_input(default: str) -> io.Combo.Input:
    """Return the mode input."""
    return io.Combo.Input(
        "mode",
        options=list(NUMBER_FORMATS),
        default=default,
        tooltip="scaled (HSWQ V2): a scale per layer, the smallest error. "
        "compatible (HSWQ V1): the plain FP8 grid, for files that other loaders shall read.",
    )


def statistics_input(tooltip: str) -> io.Combo.Input:
    """Return the statistics input."""
    options = choice.statistics_choices()
    return io.Combo.Input("statistics", options=options, default=choice.AUTO, tooltip=tooltip)


def say(node_id: str | None, text: str) -> None:
    """Show a line on a node, as ComfyUI does for its own text."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def summary(plan: Plan, about: str) -> str:
    """Return a line about a quantized model."""
    return f"{len(plan.quantized)} layers FP8, {len(plan.kept)} in 16 bit; {about}"
