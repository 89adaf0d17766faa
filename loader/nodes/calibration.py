"""The calibration node: it measures every layer of a model and saves into a named session."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ...calibration import Statistics
from .. import store
from ..engine.identity import identity
from ..engine.patchers import is_quantized
from ..recording.noise_levels import levels_of
from ..recording.reasons import unrecordable
from ..recording.recorder import Recording, record
from ..recording.unrecorded import WRAPPER
from .inputs import CATEGORY, say


class HSWQCalibration(io.ComfyNode):
    """Measures every layer of a model in every step, and saves it in a named session."""

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
            outputs=[io.Model.Output(tooltip="The same model; connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, session: str) -> io.NodeOutput:
        store.check_session(session)
        if is_quantized(model):
            raise ValueError("this model is quantized: calibrate the 16-bit one")
        calibrated = model.clone()
        calibrated.add_wrapper_with_key(
            WrappersMP.OUTER_SAMPLE, WRAPPER, _calibration(session, cls.hidden.unique_id)
        )
        return io.NodeOutput(calibrated)


def _calibration(session: str, node_id: str | None) -> Callable:
    """Return a sampling wrapper that records all layers into a session."""

    def sample(executor: Callable, noise: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        patcher: ModelPatcher = executor.class_obj.model_patcher
        reason = unrecordable(patcher)
        if reason is not None:
            raise ValueError(f"this model cannot be calibrated: {reason}")
        model = identity(patcher)

        def saved(total: Statistics) -> None:
            say(node_id, f"{total.samples} of {store.target()} images in {session!r}")

        def failed(reason: str, _: bool) -> None:
            say(node_id, f"not recorded: {reason}")
            logging.warning("HSWQ: this sampling was not recorded: %s", reason)

        meta = {**levels_of(patcher, args, kwargs), **model.whole}
        recording = Recording(model.fingerprint, session, model.name, saved, failed, meta=meta)
        with record(patcher, noise.shape[0], recording):
            return executor(noise, *args, **kwargs)

    return sample
