"""The effect node: what quantizing each layer alone would change in the model's output.

Besides a workflow, a job can be this node with what a KSampler of the user's had. As a prompt
(`["4", 0]` are links to nodes of the same prompt; CheckpointLoaderSimple gives 16 bit):

    "hswq-original": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": FILE}},
    "hswq-effect": {"class_type": "HSWQMeasureEffect", "inputs": {
        "model": ["hswq-original", 0], "positive": ["6", 0], "negative": ["7", 0],
        "latent_image": ["5", 0], "cfg": 7.0, "statistics": "auto", "mode": "scaled"}}
"""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from server import PromptServer

from ...quant import QuantizeSettings
from ..jobs.effect import measure_effects
from ..jobs.sampling import Picture
from ..recording.reasons import unrecordable
from ..recording.unrecorded import unrecorded
from .inputs import (
    CATEGORY,
    COMPENSATED,
    SCALED,
    is_compensated,
    line,
    mode_input,
    number_format_of,
    rounding_input,
    statistics_input,
)


class HSWQMeasureEffect(io.ComfyNode):
    """Measures the effect of each layer's quantization, for loaders that keep layers by effect."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQMeasureEffect",
            display_name="HSWQ Measure Effect",
            category=CATEGORY,
            description="Quantizes one layer after the other in a sampling step, and measures how "
            "much the model's output changes. HSWQ loaders and export with selection by effect "
            "then keep the layers in 16 bit that matter most for their size. It takes about half "
            "a step for each layer; what is done is kept when you cancel.",
            search_aliases=["sensitivity", "rank layers", "by effect"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit model, by any loader."),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the size to measure at. A smaller size takes less "
                    "memory and time, and finds nearly the same.",
                ),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1),
                statistics_input("auto: all that was recorded of the same weights. Or one file."),
                mode_input(SCALED),
                rounding_input(),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, optional=True),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        """Run every time: there may be new statistics. Nothing is measured twice."""
        return float("nan")

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list,
        negative: list,
        latent_image: dict,
        cfg: float,
        statistics: str,
        mode: str,
        rounding: str = COMPENSATED,
        seed: int = 0,
    ) -> io.NodeOutput:
        settings = QuantizeSettings(number_format_of(mode), compensated=is_compensated(rounding))
        reason = unrecordable(model)
        if reason is not None:
            raise ValueError(f"the effects of this model cannot be measured: {reason}")
        node_id = cls.hidden.unique_id
        text = measure_effects(
            unrecorded(model),
            Picture(positive, negative, latent_image, cfg=cfg),
            seed,
            statistics,
            settings,
            lambda text: PromptServer.instance.send_progress_text(text, node_id),
        )
        return io.NodeOutput(ui=line(text))
