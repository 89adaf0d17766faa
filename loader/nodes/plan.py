"""The plan node: searches all layers of a model ahead, so that the panel can tell its error."""

from __future__ import annotations

from comfy_api.latest import io

from ...quant import NUMBER_FORMATS
from ..jobs.model_files import source_path, sources
from ..jobs.search import search_all
from .inputs import CATEGORY, SCALED, mode_input, say, statistics_input


class HSWQPlan(io.ComfyNode):
    """Searches every layer of a model file that no load or export has searched yet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQPlan",
            display_name="HSWQ Plan",
            category=CATEGORY,
            description="Searches the clipping of every layer of a model, so that the HSWQ panel "
            "knows the error of any keep ratio, and loading with it takes no search.",
            search_aliases=["analyze fp8", "quantization error"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "source",
                    options=sources(),
                    tooltip="A 16-bit (or 32-bit) file of models/checkpoints or "
                    "models/diffusion_models.",
                ),
                statistics_input("auto: all that was recorded of these very weights. Or one file."),
                mode_input(SCALED),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        """Run every time: there may be new statistics. What was searched is not searched again."""
        return float("nan")

    @classmethod
    def execute(cls, source: str, statistics: str, mode: str) -> io.NodeOutput:
        text = search_all(source_path(source), statistics, NUMBER_FORMATS[mode])
        say(cls.hidden.unique_id, text)
        return io.NodeOutput(ui={"text": [text]})
