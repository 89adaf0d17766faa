"""The loader nodes: they load a file, and return a quantized model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import comfy.model_management as memory
import comfy.sd
import folder_paths
from comfy_api.latest import io

from ...quant import INT8, NUMBER_FORMATS, QuantizeSettings
from .. import store
from ..engine import matmul
from ..engine.adopt import ATTACHMENT
from ..engine.loading import load_checkpoint, load_diffusion_model
from ..engine.model_structure import find_layers, sixteen_bit_options
from ..engine.patchers import quantized_layers
from ..engine.quantizer import has_numbers
from ..files.fingerprints import fingerprint
from ..files.model_file import ModelFile
from ..jobs import choice
from ..jobs.also_keep import ENDS
from ..jobs.keeping import BY_SENSITIVITY, DEFAULT_MB, Keeping, choose_keeping
from ..jobs.links import watch
from ..jobs.outcome import Sizes, outcome_of_plan
from .inputs import (
    CATEGORY,
    COMPENSATED,
    SCALED,
    also_keep_input,
    by_effect_inputs,
    is_compensated,
    keep_ratio_input,
    line,
    mode_input,
    number_format_of,
    rounding_input,
    statistics_input,
    summary,
)

_AS_STORED = "as the file has it"


def _inputs() -> list[io.Input]:
    """Return the inputs that both loaders have besides the file."""
    return [
        statistics_input(
            "auto: all that was recorded of the same weights, whatever the file is called. "
            "Or one statistics file."
        ),
        mode_input(_default_mode()),
        keep_ratio_input(),
        io.Combo.Input(
            "without_statistics",
            options=list(choice.WITHOUT_STATISTICS),
            default=choice.KEEP_16_BIT,
            tooltip=f"What to do while fewer than {store.USABLE_SAMPLES} images are recorded.",
        ),
        io.Boolean.Input(
            "fp8_matmul",
            default=False,
            optional=True,
            tooltip="Multiply in FP8 too, on cards that can (RTX 40 and 50, H100). It takes less "
            "of the GPU's time, and is less like the original, because the layers' inputs are "
            "rounded as well. On other cards, and for layers whose inputs were not measured, "
            "nothing changes.",
        ),
        also_keep_input(),
        rounding_input(),
        *by_effect_inputs(),
        io.Boolean.Input(
            "int8_matmul",
            default=False,
            optional=True,
            tooltip="With the mode int8, multiply in INT8 too, on devices that can (RTX 20 and "
            "later among others). It may take less time, and is less like the original, because "
            "the layers' inputs are rounded as well.",
        ),
    ]


def _default_mode() -> str:
    """Return the mode of new nodes: FP8, and INT8 where the device has no FP8."""
    fits = has_numbers(memory.get_torch_device(), NUMBER_FORMATS[SCALED])
    return SCALED if fits else INT8.name


def _state(folder: str, name: str | None, statistics: str | None) -> tuple:
    """Return a value that changes when a loader should run again: with the file, or a milestone.

    Args:
        folder: one of ComfyUI's model folders.
        name: of the file; None if the input is linked.
        statistics: "auto" or a file; None if the input is linked.
    """
    if name is None or statistics is None:
        return "linked", watch.changes()
    found = fingerprint(folder_paths.get_full_path_or_raise(folder, name))
    return found, *choice.statistics_state(statistics, found)


class _Wanted(NamedTuple):
    """The values of `_inputs`. Older prompts lack the last ones, which have defaults."""

    statistics: str
    mode: str
    keep_ratio: float
    without_statistics: str
    fp8_matmul: bool = False
    also_keep: str = ENDS
    rounding: str = COMPENSATED
    selection: str = BY_SENSITIVITY
    keep_mb: float = DEFAULT_MB
    fit_gb: float = 0.0
    int8_matmul: bool = False

    @property
    def products(self) -> dict[str, bool]:
        """What the loaders are asked to multiply in."""
        return {"fp8_matmul": self.fp8_matmul, "int8_matmul": self.int8_matmul}

    def choose(self, file: ModelFile) -> choice.Choice:
        """Decide how a file is quantized."""
        settings = QuantizeSettings(
            number_format_of(self.mode), compensated=is_compensated(self.rounding)
        )
        keeping = Keeping(
            self.keep_ratio, self.also_keep, self.selection, self.keep_mb, self.fit_gb
        )
        return choose_keeping(self.statistics, file, settings, keeping, self.without_statistics)


def _load(
    folder: str,
    name: str,
    wanted: _Wanted,
    load: Callable[..., tuple],
    load_stock: Callable[[str, dict], tuple],
) -> io.NodeOutput:
    """Load a file, and say on the node how: quantized, as it is stored, or in 16 bit for now.

    Args:
        folder: one of ComfyUI's model folders.
        name: of the file in it.
        wanted: the values of the other inputs.
        load: is called like `load_checkpoint`, and returns the node's outputs.
        load_stock: loads a path as ComfyUI's own loader does, with model_options.
    """
    began = time.perf_counter()
    file = ModelFile(folder_paths.get_full_path_or_raise(folder, name))
    watch.note(_state, folder, name, wanted.statistics)
    if file.is_quantized:
        loaded, about = load(file, None, **wanted.products), _AS_STORED
    else:
        chosen = wanted.choose(file)
        about = chosen.about
        if chosen.decider is None:
            find_layers(file)  # raises a clear error for a bad file, which the stock loader lacks
            logging.info("HSWQ: %s: %s", name, about)
            return io.NodeOutput(*load_stock(file.path, sixteen_bit_options(file)), ui=line(about))
        loaded = load(file, chosen.decider, **wanted.products)
        chosen.keep(loaded[0].get_attachment(ATTACHMENT))
        chosen.keep_rounded(quantized_layers(loaded[0]))
    plan, products = loaded[0].get_attachment(ATTACHMENT), ""
    if wanted.int8_matmul if plan.number_format is INT8 else wanted.fp8_matmul:
        products = matmul.products(loaded[0], plan.number_format)
    outcome = outcome_of_plan(plan, Sizes.of(file))
    took = f"loaded in {time.perf_counter() - began:.1f} s"
    return io.NodeOutput(*loaded, ui=line(summary(plan, outcome, about, products, took)))


class HSWQCheckpointLoader(io.ComfyNode):
    """Loads a checkpoint and quantizes its diffusion model while it loads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQCheckpointLoader",
            display_name="Load Checkpoint (HSWQ FP8)",
            category=CATEGORY,
            description="Loads a 16-bit checkpoint and quantizes its diffusion model to FP8, by "
            "what was recorded while you sampled it. Nothing is converted on disk.",
            search_aliases=["load checkpoint fp8", "quantize", "HSWQ loader"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="A 16-bit (or 32-bit) checkpoint, or one that is FP8 already.",
                ),
                *_inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model in FP8."),
                io.Clip.Output(tooltip="The text encoder, as the stock loader gives it."),
                io.Vae.Output(tooltip="The VAE, as the stock loader gives it."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str | None, statistics: str | None, **_) -> tuple:
        return _state("checkpoints", ckpt_name, statistics)

    @classmethod
    def execute(cls, ckpt_name: str, **wanted) -> io.NodeOutput:
        def load_stock(path: str, options: dict) -> tuple:
            embeddings = folder_paths.get_folder_paths("embeddings")
            return comfy.sd.load_checkpoint_guess_config(
                path, embedding_directory=embeddings, model_options=options
            )[:3]

        return _load("checkpoints", ckpt_name, _Wanted(**wanted), load_checkpoint, load_stock)


class HSWQDiffusionModelLoader(io.ComfyNode):
    """Loads a file that holds only a diffusion model, and quantizes it while it loads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQDiffusionModelLoader",
            display_name="Load Diffusion Model (HSWQ FP8)",
            category=CATEGORY,
            description="Loads a 16-bit diffusion model and quantizes it to FP8, by what was "
            "recorded while you sampled it. Nothing is converted on disk.",
            search_aliases=["unet loader fp8", "load unet", "quantize", "HSWQ loader"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A 16-bit (or 32-bit) diffusion model, or one that is FP8 already.",
                ),
                *_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The diffusion model in FP8.")],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None, statistics: str | None, **_) -> tuple:
        return _state("diffusion_models", unet_name, statistics)

    @classmethod
    def execute(cls, unet_name: str, **wanted) -> io.NodeOutput:
        def load(*args, **kwargs) -> tuple:
            return (load_diffusion_model(*args, **kwargs),)

        def load_stock(path: str, options: dict) -> tuple:
            return (comfy.sd.load_diffusion_model(path, model_options=options),)

        return _load("diffusion_models", unet_name, _Wanted(**wanted), load, load_stock)
