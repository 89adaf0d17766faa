"""The export node: a quantized model as a file, for other loaders or to share."""

from __future__ import annotations

import os
import time

import folder_paths
from comfy_api.latest import io

from ..files.layer_formats import FILE_FORMATS, SCALED
from ..jobs import choice
from ..jobs.allowed import check_choice
from ..jobs.also_keep import ENDS
from ..jobs.export import export
from ..jobs.export_settings import MODEL_ONLY, WHAT, ExportSettings
from ..jobs.model_files import source_path, sources
from ..jobs.output_path import default_name, export_path
from .inputs import (
    CATEGORY,
    COMPENSATED,
    also_keep_input,
    by_effect_inputs,
    is_compensated,
    keep_ratio_input,
    line,
    rounding_input,
    statistics_input,
)


def _inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "source",
            options=sources(),
            tooltip="A 16-bit (or 32-bit) file of models/checkpoints or models/diffusion_models.",
        ),
        statistics_input("auto: all that was recorded of the same weights. Or one file."),
        io.Combo.Input(
            "format",
            options=list(FILE_FORMATS),
            default=SCALED,
            tooltip="scaled: ComfyUI's own FP8 format, for any recent ComfyUI; "
            "convolutions stay 16 bit, which stock ComfyUI cannot scale.\n"
            "scaled, convs too: smaller, for the HSWQ loaders only: ComfyUI's own load it without "
            "an error, and pictures are black.\n"
            "compatible (HSWQ V1): the plain FP8 grid, for old loaders too.\n"
            "int8: ComfyUI's own INT8 format with a scale for each row, from ComfyUI 0.30 on; "
            "convolutions stay 16 bit there.\n"
            "int8, convs too: smaller, for the HSWQ loaders only: black in ComfyUI's own.\n"
            "original V2: for the HSWQ author's own loader and ours only, black in all others.",
        ),
        keep_ratio_input(),
        io.Combo.Input(
            "what",
            options=list(WHAT),
            tooltip="full checkpoint: everything else in the file is copied as it is. "
            "diffusion model only: without text encoders and VAE.",
        ),
        io.String.Input(
            "filename",
            default="",
            tooltip="Below output/checkpoints or output/diffusion_models, where ComfyUI's "
            "loaders find it. May name subfolders. Empty: named after the source.",
        ),
        io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of that name."),
        io.Combo.Input(
            "without_statistics",
            options=[choice.FAIL, choice.QUANTIZE_UNIFORMLY],
            default=choice.FAIL,
            tooltip="What to do while too few images are recorded.",
        ),
        also_keep_input(),
        rounding_input(),
        *by_effect_inputs(),
    ]


class HSWQExport(io.ComfyNode):
    """Writes a 16-bit model file as a file whose diffusion model is FP8."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQExport",
            display_name="HSWQ Export",
            category=CATEGORY,
            description="Writes a 16-bit checkpoint or diffusion model as an FP8 file, with the "
            "same weights that the HSWQ loaders make of it.",
            search_aliases=["save fp8", "convert checkpoint", "quantize"],
            is_output_node=True,
            inputs=_inputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        """Run every time: the file may have been deleted. One that exists is not written again."""
        return float("nan")

    @classmethod
    def execute(
        cls,
        source: str,
        statistics: str,
        format: str,
        keep_ratio: float,
        what: str,
        filename: str,
        overwrite: bool,
        without_statistics: str,
        also_keep: str = ENDS,
        rounding: str = COMPENSATED,
        **by_effect,
    ) -> io.NodeOutput:
        check_choice("what", what, WHAT)
        path = source_path(source)
        settings = ExportSettings(
            format,
            statistics,
            keep_ratio,
            without_statistics,
            what == MODEL_ONLY,
            also_keep,
            is_compensated(rounding),
            **by_effect,
        )
        folder = "diffusion_models" if what == MODEL_ONLY else source.partition("/")[0]
        name = filename or default_name(source, settings.file_format.short)
        target = export_path(name, folder)
        began = time.perf_counter()
        exported = export(path, target, settings, overwrite=overwrite)
        shown = os.path.relpath(target, folder_paths.get_output_directory())
        existed = exported.plan is None
        seconds = None if existed else time.perf_counter() - began
        did = "is there already, unchanged" if existed else "written"
        did += " (for the HSWQ loaders only)" if settings.file_format.only_ours else ""
        text = (
            f"{shown} {did}: {exported.outcome.sentence(seconds)}; {exported.quantized} layers "
            f"{exported.outcome.title}, {exported.kept} in 16 bit; the file has "
            f"{exported.size / 2**20:.0f} MiB"
        )
        text = "; ".join(filter(None, (text, exported.about)))
        place = {"filename": target.name, "subfolder": os.path.dirname(shown), "type": "output"}
        outcome = exported.outcome.to_json()
        facts = {"existed": existed, "seconds": seconds, "bytes": exported.size, "outcome": outcome}
        return io.NodeOutput(ui={"models": [{**place, **facts}], **line(text)})
