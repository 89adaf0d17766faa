"""The converter node: a MODEL quantized in memory."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...quant import BySensitivity, QuantizeSettings, SearchSettings
from ..engine.adopt import ATTACHMENT
from ..engine.converter import convert
from ..engine.identity import identity
from ..jobs import choice
from ..jobs.links import watch
from ..jobs.outcome import Sizes, outcome_of_plan
from .inputs import (
    CATEGORY,
    COMPATIBLE,
    keep_ratio_input,
    line,
    mode_input,
    number_format_of,
    statistics_input,
    summary,
)


class HSWQConverter(io.ComfyNode):
    """Quantizes a MODEL in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQConverter",
            display_name="HSWQ FP8 Converter",
            category=CATEGORY,
            description="Quantizes a 16-bit model to FP8 in memory. LoRAs and merges before this "
            "node are baked in. The input model is not changed.",
            search_aliases=["fp8", "quantize", "convert"],
            inputs=[
                io.Model.Input("model", tooltip="A 16-bit model."),
                statistics_input(
                    "auto: all that was recorded of this model. Or one statistics file, for "
                    "example of a merge that was calibrated."
                ),
                mode_input(COMPATIBLE),
                keep_ratio_input(),
                io.Int.Input(
                    "bins", default=4096, min=2, max=65536, advanced=True,
                    tooltip="Bins of the weighted histogram.",
                ),
                io.Int.Input(
                    "candidates", default=200, min=2, max=10000, advanced=True,
                    tooltip="Clipping values tried in each round of the search.",
                ),
                io.Int.Input(
                    "refinements", default=3, min=0, max=50, advanced=True,
                    tooltip="Rounds after the first. Each searches around the best value so far.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The quantized model.")],
            has_intermediate_output=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_) -> int:
        """Run again at a new milestone, or when the statistics file changes."""
        return watch.changes()

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        statistics: str,
        mode: str,
        keep_ratio: float,
        bins: int,
        candidates: int,
        refinements: int,
    ) -> io.NodeOutput:
        search = SearchSettings(bins, candidates, refinements)
        settings = QuantizeSettings(number_format_of(mode), BySensitivity(keep_ratio), search)
        its = identity(model)
        watch.note(choice.statistics_state, statistics, its and its.fingerprint)
        name = its.name if its else type(model.model).__name__
        # A Plan is kept for a file's own weights; here there may be LoRAs on them.
        chosen = choice.choose(
            statistics, its and its.fingerprint, name, settings, choice.FAIL, keep=False
        )
        converted = convert(model, chosen.decider)
        plan = converted.get_attachment(ATTACHMENT)
        outcome = outcome_of_plan(plan, Sizes.of_network(converted))
        return io.NodeOutput(converted, ui=line(summary(plan, outcome, chosen.about)))
