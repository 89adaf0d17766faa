"""The whole story on a toy SDXL, in a real ComfyUI: record, load quantized, compare.

Prints a table and writes a picture. The checkpoint is a toy that has been trained on shapes
(tests/toy/train.py), so its pictures show what prompts say; all else is what users run.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from environment.host import DEV
from harness.client import Client, Run
from harness.fixtures import PROBE_NODES, free
from harness.pictures import Panel, draw
from harness.prompts import (
    CHECKPOINT,
    Prompt,
    converter,
    hswq_loader,
    node,
    stock_loader,
    text_to_latent,
    through,
)
from harness.server import ComfyUIServer
from PIL import Image
from toy.checkpoint import make_trained_checkpoint, make_trained_diffusion_model
from toy.drawing import EDGE

SUBJECTS = (
    "a red circle at the top left on navy",
    "a blue triangle at the centre on sand",
    "a white ring at the bottom right on grey",
    "a green square at the top right on navy",
)
PROMPT = "a white triangle at the top left on grey"
BATCH = 8
IMAGES = BATCH * len(SUBJECTS)  # as few as the loader quantizes by
SIZE = 8 * EDGE
STEPS = 20
RECORDING_STEPS = 40  # a twentieth of the layers is measured in each, and each layer 8 times
SEED = 2
CFG = 5.0
DIFFUSION_MODEL = "sd_xl_base_1.0_unet.safetensors"
FLOAT8 = "float8_e4m3fn"
PICTURE = DEV / "demo.png"
AMPLIFIED = 4


class Result(NamedTuple):
    """One way to load the model, and what came of it."""

    name: str
    about: str
    dtypes: list[str]  # of the layers' weights in memory
    megabytes: float
    latent: torch.Tensor
    picture: Image.Image

    @property
    def quantized(self) -> int:
        return self.dtypes.count(FLOAT8)


def sampling(loader: dict, text: str, **settings: int) -> Prompt:
    prompt = text_to_latent(loader, size=SIZE, **settings)
    prompt["positive"]["inputs"]["text"] = text
    prompt["negative"]["inputs"]["text"] = ""
    prompt["sampler"]["inputs"]["cfg"] = CFG
    return prompt


def record(client: Client) -> None:
    """Sample with stock nodes alone: recording happens by itself.

    One image less, because the 16-bit picture of the comparison is recorded too.
    """
    for number, subject in enumerate(SUBJECTS):
        batch = BATCH - 1 if number == 0 else BATCH
        settings = {"batch": batch, "steps": RECORDING_STEPS, "seed": 1000 + number}
        client.run(sampling(stock_loader(), subject, **settings))
        print(f"  {BATCH * (number + 1) - 1:2} of {IMAGES} images", flush=True)


def ways() -> dict[str, tuple[str, Prompt]]:
    """Return a prompt for each way to have the model, and what is to be said about it."""
    settings = {"steps": STEPS, "seed": SEED}
    stock = sampling(stock_loader(), PROMPT, **settings)
    cast = node("UNETLoader", unet_name=DIFFUSION_MODEL, weight_dtype="fp8_e4m3fn")
    return {
        "16 bit": ("Load Checkpoint (16 bit)", stock),
        "HSWQ loader": ("Load Checkpoint (HSWQ FP8)", sampling(hswq_loader(), PROMPT, **settings)),
        "HSWQ converter": (
            "HSWQ FP8 Converter, compatible",
            through(stock, "converted", converter(["loader", 0])),
        ),
        "plain FP8 cast": ("ComfyUI's fp8_e4m3fn", through(stock, "cast", cast)),
    }


def sample(client: Client, name: str, about: str, prompt: Prompt) -> Result:
    """Sample with one of the ways, from a server with nothing in memory."""
    free(client)
    prompt = {
        **prompt,
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["loader", 2]),
        "picture": node("SaveImage", images=["decode", 0], filename_prefix="demo"),
        "probe": node("ProbeModel", model=prompt["sampler"]["inputs"]["model"]),
    }
    run = client.run(prompt)
    facts = run.outputs["probe"]["facts"][0]
    dtypes, megabytes = list(facts["layers"].values()), facts["bytes"] / 1e6
    print(f"  {about}", flush=True)
    return Result(name, about, dtypes, megabytes, client.latent(run), picture(client, run))


def picture(client: Client, run: Run) -> Image.Image:
    saved = run.outputs["picture"]["images"][0]
    return Image.open(io.BytesIO(client.saved_file(saved))).convert("RGB")


def difference(result: Result, original: Result) -> tuple[float, float]:
    """Return the relative L2 distance and the cosine between two results' latents."""
    a, b = result.latent.flatten().double(), original.latent.flatten().double()
    return ((a - b).norm() / b.norm()).item(), torch.cosine_similarity(a, b, 0).item()


def table(results: list[Result]) -> str:
    """Return what was measured, a line for each way."""
    lines = [
        f"{'':32}{'layers':>15}{'UNet':>10}{'latent, compared with 16 bit':>32}",
        f"{'':32}{'16 bit':>8}{'FP8':>7}{'MB':>10}{'relative L2':>20}{'cosine':>12}",
    ]
    for result in results:
        kept = len(result.dtypes) - result.quantized
        distance, cosine = difference(result, results[0])
        compared = f"{distance:20.3f}{cosine:12.4f}" if result is not results[0] else ""
        counts = f"{kept:8}{result.quantized:7}{result.megabytes:10.2f}"
        lines.append(f"{result.about:32}{counts}{compared}")
    return "\n".join(lines)


def panels(results: list[Result]) -> list[Panel]:
    """Return the picture's columns: a picture, and below it how far it is from the first."""
    original = results[0]
    columns = []
    for result in results:
        lines = [f"{result.megabytes:.1f} MB"]
        if result is not original:
            lines.append(f"{difference(result, original)[0]:.1%} off")
        columns.append(Panel(result.name, ", ".join(lines), result.picture))
    return columns


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hswq-demo-") as folder:
        server = ComfyUIServer(Path(folder), {"hswq_probe": PROBE_NODES}, ("--fp16-unet",))
        make_trained_checkpoint(server.models / "checkpoints" / CHECKPOINT)
        make_trained_diffusion_model(server.models / "diffusion_models" / DIFFUSION_MODEL)
        print("Starting ComfyUI with a toy SDXL on the CPU ...", flush=True)
        try:
            with server:
                client = Client(server.url)
                print("Recording while stock nodes sample:", flush=True)
                record(client)
                print("Sampling the same seed with each model:", flush=True)
                results = [sample(client, name, *way) for name, way in ways().items()]
        except Exception:
            print(server.log_tail(), file=sys.stderr)
            raise
    draw(panels(results), PICTURE, AMPLIFIED)
    print(f"\n{IMAGES} images recorded, {len(results[0].dtypes)} layers\n\n{table(results)}\n")
    print(f"{PICTURE} ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
