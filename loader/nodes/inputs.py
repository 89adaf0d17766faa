"""What several nodes share: inputs, and the line of text on a node that says what it did."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...quant import FP8_PLAIN, FP8_SCALED, NUMBER_FORMATS, NumberFormat, Plan
from ..jobs import choice
from ..jobs.allowed import check_choice
from ..jobs.also_keep import ENDS
from ..jobs.keeping import BY_SENSITIVITY, DEFAULT_MB, MOST_GB, MOST_MB, SELECTIONS
from ..jobs.outcome import Outcome

CATEGORY = "HSWQ"
COMPENSATED, NEAREST = "compensated", "nearest"
SCALED, COMPATIBLE = FP8_SCALED.name, FP8_PLAIN.name


def keep_ratio_input() -> io.Float.Input:
    """Return the keep_ratio input."""
    return io.Float.Input(
        "keep_ratio",
        default=0.25,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Share of the measured layers that stay in 16 bit: the most sensitive ones. "
        "0.25 is recommended. Less saves memory; more is closer to the original.",
    )


def mode_input(default: str) -> io.Combo.Input:
    """Return the mode input."""
    return io.Combo.Input(
        "mode",
        options=list(NUMBER_FORMATS),
        default=default,
        tooltip="scaled (HSWQ V2): one scale for each layer. "
        "compatible (HSWQ V1): the plain FP8 grid, which other loaders can read too. "
        "int8: INT8 with a scale for each output row. Same size, a fraction of FP8's error, for "
        "every device.",
    )


def number_format_of(mode: object) -> NumberFormat:
    """Return the number format of a mode, which may be linked.

    Raises:
        ValueError: there is no such mode.
    """
    check_choice("mode", mode, NUMBER_FORMATS)
    return NUMBER_FORMATS[mode]


def also_keep_input() -> io.String.Input:
    """Return the also_keep input."""
    return io.String.Input(
        "also_keep",
        default=ENDS,
        optional=True,
        tooltip="Layers that stay 16 bit whatever keep_ratio says: names with commas between them. "
        "first and last are the projections from the latent and back to it. They weigh almost "
        "nothing (23 KB in SDXL) and matter most. HSWQ as published keeps none: leave it empty.",
    )


def rounding_input() -> io.Combo.Input:
    """Return the rounding input."""
    return io.Combo.Input(
        "rounding",
        options=[COMPENSATED, NEAREST],
        default=COMPENSATED,
        optional=True,
        tooltip="compensated: each weight's rounding error is made up for by the weights after it, "
        "as the recorded images tell. Same size and format, a third of the error; the first load "
        "takes some seconds more. nearest: HSWQ as published.",
    )


def is_compensated(rounding: object) -> bool:
    """Whether a rounding, which may be linked, is the compensated one.

    Raises:
        ValueError: there is no such rounding.
    """
    check_choice("rounding", rounding, (COMPENSATED, NEAREST))
    return rounding == COMPENSATED


def by_effect_inputs() -> list[io.Input]:
    """Return selection, keep_mb and fit_gb."""
    return [
        io.Combo.Input(
            "selection",
            options=list(SELECTIONS),
            default=BY_SENSITIVITY,
            optional=True,
            tooltip="by sensitivity: keep_ratio of the layers, those whose outputs vary most, as "
            "HSWQ does. by effect: those that change the model's output most for their size, as "
            "HSWQ Measure Effect found; before it has run, as recorded inputs let expect. To "
            "fit this card: as many as it has room for beside a step of 1024 x 1024 pixels.",
        ),
        io.Float.Input(
            "keep_mb",
            default=DEFAULT_MB,
            min=0.0,
            max=MOST_MB,
            step=0.1,
            optional=True,
            tooltip="By effect: MiB that layers in 16 bit may add. 80 is 3% of SDXL in FP8.",
        ),
        io.Float.Input(
            "fit_gb",
            default=0.0,
            min=0.0,
            max=MOST_GB,
            step=0.1,
            optional=True,
            tooltip="By effect: GiB that the whole diffusion model may have, in place of keep_mb. "
            "0: keep_mb decides.",
        ),
    ]


def statistics_input(tooltip: str) -> io.Combo.Input:
    """Return the statistics input."""
    options = choice.statistics_choices()
    return io.Combo.Input("statistics", options=options, default=choice.AUTO, tooltip=tooltip)


def line(text: str) -> dict[str, list[str]]:
    """Return the `ui` value that shows a line on a node: its text output (see web/nodes/lines.mjs).

    The frontend keeps an output when the job has ended, and ComfyUI sends it again if the node's
    result is cached. For that, a node that is not an output node needs `has_intermediate_output`.
    """
    return {"text": [text]}


def say(node_id: str | None, text: str) -> None:
    """Show a line on a node after it has run, as when a sampling that it wraps has ended."""
    running = get_executing_context()
    if running is None or node_id is None:
        return
    server = PromptServer.instance
    if server.client_id is None:  # no browser: the prompt was queued by a script
        return
    told = {"node": node_id, "display_node": node_id, "output": line(text)}
    server.send_sync("executed", {**told, "prompt_id": running.prompt_id}, server.client_id)


def summary(plan: Plan, outcome: Outcome, *more: str) -> str:
    """Return the line about a quantized model for its node: what it gives, and what else."""
    layers = f"{len(plan.quantized)} layers {outcome.title}, {len(plan.kept)} in 16 bit"
    return "; ".join(filter(None, (outcome.sentence(), layers, *more)))
