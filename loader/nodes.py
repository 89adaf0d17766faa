"""The nodes: adapters between ComfyUI's graph and the rooms that do the work."""

from __future__ import annotations

import logging
import os

import comfy.sd
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from server import PromptServer

from ..quant import Plan, SearchSettings
from . import choice, store
from .converter import convert
from .loading import (
    ATTACHMENT,
    QuantizeSettings,
    check_checkpoint,
    identity,
    is_quantized,
    load_checkpoint,
)
from .modelfile import fingerprint
from .recording import WRAPPER, record, unrecordable

CATEGORY = "HSWQ"
SCALED, COMPATIBLE = "scaled", "compatible"

_KEEP_RATIO_TOOLTIP = (
    "Share of the measured layers, the most sensitive ones, that keep their 16-bit weights. "
    "0.25 is the recommendation; less saves memory, more is closer to the 16-bit model."
)
_MODE_TOOLTIP = (
    "scaled (HSWQ V2): a scale per layer, the smallest error. "
    "compatible (HSWQ V1): the plain FP8 grid, for files that other loaders shall read."
)


def _keep_ratio() -> io.Float.Input:
    return io.Float.Input(
        "keep_ratio", default=0.25, min=0.0, max=1.0, step=0.01, tooltip=_KEEP_RATIO_TOOLTIP
    )


def _mode(default: str) -> io.Combo.Input:
    return io.Combo.Input(
        "mode", options=[SCALED, COMPATIBLE], default=default, tooltip=_MODE_TOOLTIP
    )


def _statistics(tooltip: str) -> io.Combo.Input:
    options = choice.statistics_choices()
    return io.Combo.Input("statistics", options=options, default=choice.AUTO, tooltip=tooltip)


def _say(node_id: str | None, text: str) -> None:
    """Show a line on a node, as ComfyUI does for its own text."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def _summary(plan: Plan, about: str) -> str:
    return f"{len(plan.quantized)} layers FP8, {len(plan.kept)} in 16 bit; {about}"


class HSWQCheckpointLoader(io.ComfyNode):
    """Loads a checkpoint and quantizes its diffusion model on the way in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQCheckpointLoader",
            display_name="Load Checkpoint (HSWQ FP8)",
            category=CATEGORY,
            description="Loads a 16-bit checkpoint with its diffusion model quantized to FP8 by "
            "what was recorded while you sampled with it. Nothing is converted on disk.",
            search_aliases=["load checkpoint fp8", "quantize", "HSWQ loader"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="A 16-bit (or 32-bit) checkpoint.",
                ),
                _statistics(
                    "auto: all that was recorded of this very checkpoint, whatever its name. "
                    "Or one statistics file."
                ),
                _mode(SCALED),
                _keep_ratio(),
                io.Combo.Input(
                    "without_statistics",
                    options=list(choice.WITHOUT_STATISTICS),
                    default=choice.KEEP_16_BIT,
                    tooltip="What to do while there are fewer than "
                    f"{store.USABLE_SAMPLES} recorded samples.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model in FP8."),
                io.Clip.Output(tooltip="The text encoder, as the stock loader gives it."),
                io.Vae.Output(tooltip="The VAE, as the stock loader gives it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name, statistics, **_) -> tuple:
        """Run again when the file changes, or its statistics reach the next milestone."""
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        if statistics != choice.AUTO:
            chosen = os.stat(folder_paths.get_full_path_or_raise(store.FOLDER, statistics))
            return fingerprint(path), chosen.st_size, chosen.st_mtime_ns
        known = store.statistics_of(fingerprint(path))
        return fingerprint(path), choice.milestone(known.samples if known else 0)

    @classmethod
    def execute(cls, ckpt_name, statistics, mode, keep_ratio, without_statistics) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        settings = QuantizeSettings(mode == SCALED, keep_ratio)
        planner, about = choice.planner_for(
            statistics, fingerprint(path), ckpt_name, settings, without_statistics
        )
        if planner is None:
            check_checkpoint(path)
            logging.info("HSWQ: %s: %s", ckpt_name, about)
            _say(cls.hidden.unique_id, about)
            embeddings = folder_paths.get_folder_paths("embeddings")
            loaded = comfy.sd.load_checkpoint_guess_config(path, embedding_directory=embeddings)
            return io.NodeOutput(*loaded[:3])
        patcher, clip, vae = load_checkpoint(path, planner)
        _say(cls.hidden.unique_id, _summary(patcher.get_attachment(ATTACHMENT), about))
        return io.NodeOutput(patcher, clip, vae)


class HSWQCalibration(io.ComfyNode):
    """Measures every layer of a model in every forward, into a named session."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQCalibration",
            display_name="HSWQ Calibration (Dual Monitor)",
            category=CATEGORY,
            description="Records HSWQ statistics of a model while you sample with it. They "
            "accumulate over runs and restarts, and are saved after every sampling.",
            search_aliases=["dual monitor", "calibrate"],
            inputs=[
                io.Model.Input("model", tooltip="A 16-bit model."),
                io.String.Input(
                    "session",
                    default="calibration",
                    tooltip="Runs with the same session add up in one file.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, to be sampled with.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, session) -> io.NodeOutput:
        store.check_session(session)
        if is_quantized(model):
            raise ValueError("this model is quantized: calibrate the 16-bit one")
        calibrated = model.clone()
        calibrated.add_wrapper_with_key(
            WrappersMP.OUTER_SAMPLE, WRAPPER, _calibration(session, cls.hidden.unique_id)
        )
        return io.NodeOutput(calibrated)


def _calibration(session: str, node_id: str | None):
    """Return a sampling wrapper that records all layers into a session."""

    def sample(executor, noise, *args, **kwargs):
        patcher: ModelPatcher = executor.class_obj.model_patcher
        reason = unrecordable(patcher)
        if reason is not None:
            raise ValueError(f"this model cannot be calibrated: {reason}")
        name, its_fingerprint = identity(patcher) or (session, None)

        def saved(total) -> None:
            _say(node_id, f"{total.samples} of {store.TARGET_SAMPLES} samples in {session!r}")

        with record(patcher, noise.shape[0], its_fingerprint, session, name, saved):
            return executor(noise, *args, **kwargs)

    return sample


class HSWQConverter(io.ComfyNode):
    """Quantizes a MODEL in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQConverter",
            display_name="HSWQ FP8 Converter",
            category=CATEGORY,
            description="Quantizes a 16-bit model to FP8 in memory, LoRAs and merges before it "
            "included. The input model stays as it is.",
            search_aliases=["fp8", "quantize", "convert"],
            inputs=[
                io.Model.Input("model", tooltip="A 16-bit model."),
                _statistics(
                    "auto: all that was recorded of this model. Or one statistics file, as for "
                    "a merge that was calibrated."
                ),
                _mode(COMPATIBLE),
                _keep_ratio(),
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
                    tooltip="Rounds after the first, each around the best so far.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The quantized model.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, statistics, **_) -> tuple:
        """Run again when the chosen statistics file changes."""
        if statistics == choice.AUTO:
            return (choice.AUTO,)
        chosen = os.stat(folder_paths.get_full_path_or_raise(store.FOLDER, statistics))
        return statistics, chosen.st_size, chosen.st_mtime_ns

    @classmethod
    def execute(
        cls, model, statistics, mode, keep_ratio, bins, candidates, refinements
    ) -> io.NodeOutput:
        search = SearchSettings(bins, candidates, refinements)
        settings = QuantizeSettings(mode == SCALED, keep_ratio, search)
        path, its_fingerprint = identity(model) or (type(model.model).__name__, None)
        planner, about = choice.planner_for(
            statistics, its_fingerprint, os.path.basename(path), settings, choice.FAIL
        )
        converted = convert(model, planner)
        _say(cls.hidden.unique_id, _summary(converted.get_attachment(ATTACHMENT), about))
        return io.NodeOutput(converted)


NODES = [HSWQCheckpointLoader, HSWQCalibration, HSWQConverter]
