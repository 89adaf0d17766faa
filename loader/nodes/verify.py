"""The verify node: whether a quantized model still makes the original's pictures.

Besides a workflow, a job can be this node with what a KSampler of the user's had. As a prompt
(numbers and names as an example; `["4", 0]` are links to nodes of the same prompt):

    "hswq-original": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": FILE}},
    "hswq-quantized": {"class_type": "HSWQCheckpointLoader", "inputs": {"ckpt_name": FILE,
        "statistics": "auto", "mode": "scaled", "keep_ratio": 0.25, "without_statistics": "fail"}},
    "hswq-verify": {"class_type": "HSWQVerify", "inputs": {
        "original": ["hswq-original", 0], "quantized": ["hswq-quantized", 0],
        "vae": ["hswq-original", 2], "positive": ["6", 0], "negative": ["7", 0],
        "latent_image": ["5", 0], "seed": 1, "seeds": 8, "steps": 20, "cfg": 7.0,
        "sampler_name": "euler", "scheduler": "normal"}},
    "hswq-sheet": {"class_type": "PreviewImage", "inputs": {"images": ["hswq-verify", 0]}}
"""

from __future__ import annotations

import logging

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io

from ..engine.patchers import is_quantized
from ..jobs.sampling import Picture
from ..jobs.verify import SAME, verify
from .inputs import CATEGORY, line


class HSWQVerify(io.ComfyNode):
    """Compares what two models make of the same seeds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQVerify",
            display_name="HSWQ Verify",
            category=CATEGORY,
            description="Samples some seeds with the 16-bit and with the quantized model, and says "
            "how many pictures are the same, how alike they are, and which seed is worst.",
            search_aliases=["gate", "compare models", "fidelity", "bifurcation"],
            is_output_node=True,
            inputs=_inputs(),
            outputs=[
                io.Image.Output(
                    display_name="sheet",
                    tooltip="A row a picture, the worst 60 first: 16 bit, quantized, difference.",
                ),
                io.Int.Output(display_name="same", tooltip="How many pictures are the same."),
                io.Float.Output(display_name="cosine", tooltip="Mean cosine of the latents."),
                io.Float.Output(display_name="PSNR", tooltip="Mean, in dB."),
            ],
        )

    @classmethod
    def execute(
        cls,
        original: ModelPatcher,
        quantized: ModelPatcher,
        vae: VAE,
        positive: list,
        negative: list,
        latent_image: dict,
        seed: int,
        seeds: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        threshold: float = SAME,
        amplify: float = 4.0,
    ) -> io.NodeOutput:
        if is_quantized(original):
            raise ValueError("the first model is quantized: connect the 16-bit one")
        picture = Picture(positive, negative, latent_image, steps, cfg, sampler_name, scheduler)
        with torch.inference_mode():
            verdict, sheet = verify(
                (original, quantized), vae, picture, range(seed, seed + seeds),
                threshold=threshold, amplify=amplify,
            )  # fmt: skip
        logging.info("HSWQ: %s", verdict)
        ui = {"verdict": [verdict.to_json()], **line(str(verdict))}
        numbers = verdict.same, verdict.cosine, verdict.psnr
        return io.NodeOutput(sheet, *numbers, ui=ui)


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("original", tooltip="The 16-bit model."),
        io.Model.Input("quantized", tooltip="What an HSWQ loader or converter made of it."),
        io.Vae.Input("vae"),
        io.Conditioning.Input("positive"),
        io.Conditioning.Input("negative"),
        io.Latent.Input("latent_image", tooltip="An empty latent of the size to compare."),
        io.Int.Input(
            "seed", default=0, min=0, max=2**64 - 1 - 1000,
            tooltip="The first seed; the others follow it.",
        ),
        io.Int.Input(
            "seeds", default=8, min=1, max=1000,
            tooltip="How many seeds. HSWQ's author takes 25.",
        ),
        io.Int.Input("steps", default=20, min=1, max=1000),
        io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS),
        io.Float.Input(
            "threshold", default=SAME, min=-1.0, max=1.0, step=0.01, optional=True,
            tooltip="Latents whose cosine is this or more count as the same picture.",
        ),
        io.Float.Input(
            "amplify", default=4.0, min=0.0, max=100.0, step=0.5, optional=True,
            tooltip="The sheet shows differences times this.",
        ),
    ]  # fmt: skip
