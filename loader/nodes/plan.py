"""The plan node: it searches all layers of a model, so that the panel can show the error."""

from __future__ import annotations

from comfy_api.latest import io

from ..jobs.model_files import source_path, sources
from ..jobs.search import search_all
from .inputs import CATEGORY, SCALED, line, mode_input, number_format_of, statistics_input


class HSWQPlan(io.ComfyNode):
    """Searches the layers of a model file that no load or export has searched yet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQPlan",
            display_name="HSWQ Plan",
            category=CATEGORY,
            description="Searches the clipping of every layer of a model. The HSWQ panel then "
            "knows the error of any keep ratio, and loading takes no search.",
            search_aliases=["analyze fp8", "quantization error"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "source",
                    options=sources(),
                    tooltip="A 16-bit (or 32-bit) file of models/checkpoints or "
                    "models/diffusion_models.",
                ),
                statistics_input("auto: all that was recorded of the same weights. Or one file."),
                mode_input(SCALED),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        """Run every time: there may be new statistics. No layer is searched twice."""
        return float("nan")

    @classmethod
    def execute(cls, source: str, statistics: str, mode: str) -> io.NodeOutput:
        text = search_all(source_path(source), statistics, number_format_of(mode))
        return io.NodeOutput(ui=line(text))
