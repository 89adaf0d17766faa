"""Trains the small SDXL of the fidelity benchmark and the demo on pictures that it draws itself.

python tests/toy/train.py [--device cuda] [--steps N] [--out FILE]

ComfyUI's own UNetModel with SDXL's noise schedule and EPS parameterisation, on the toy's text
encoders, which stay as they are. Half an hour on a CPU core, minutes on a GPU; the same steps and
device give the same weights. Stopped, it goes on from the last state that it saved.

What it cannot learn: with 32 channels each of SDXL's 32 groups for normalization is one channel,
whose mean goes lost before the last convolution. So a picture's mean colour stays the noise's, and
backgrounds come in colours of their own.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import common

SEED = 0
BATCH = 8
WARM_UP = 200
AVERAGED = 0.998  # of the averaged weights, kept in each step
AVERAGE_EVERY = 8
UNCONDITIONED = 0.1  # share of pictures without their prompt, for classifier-free guidance
# What the noise hides decides on the picture, but is a small part of what is predicted there. So
# errors count as those of the picture do, up to a limit.
DEVIATION = 0.6  # of the latents
# Each cycle's steps, its first rate, the step at which that would be 0, and that limit. The first
# learns to draw; the second to draw what it is told: where nearly all is noise, the prompt alone
# says what to draw. Both are cut short; the third lets it settle.
CYCLES = (
    (6800, 1.5e-3, 9000, 30.0),
    (2600, 1.5e-3, 5000, 150.0),
    (1200, 0.8e-3, 1200, 50.0),
)
SAVE_EVERY = 200
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 0, 1],
    "transformer_depth_output": [0, 0, 0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the toy SDXL.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=common.default_device())
    parser.add_argument("--steps", type=int, default=sum(steps for steps, *_ in CYCLES))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("trained.safetensors"))
    parser.add_argument("--state", type=Path, default=common.ROOT / ".dev" / "train" / "state.pt")
    return parser.parse_args()


chosen = arguments()
common.start_comfyui(chosen.device, "--use-pytorch-cross-attention")

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from toy.checkpoint import make_checkpoint  # noqa: E402
from toy.drawing import EDGE, SUBJECTS, draw, to_latent  # noqa: E402
from toy.nodes.toy_sdxl import TrainedToySDXL  # noqa: E402


def build() -> torch.nn.Module:
    """ComfyUI's model, with torch's initial weights; what adds to a residual begins at 0."""
    torch.manual_seed(SEED)
    config = TrainedToySDXL(UNET)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    for name, module in model.diffusion_model.named_modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
            if isinstance(module, kind):
                kind.reset_parameters(module)  # ComfyUI's own does nothing
        if name.endswith(("out_layers.3", "proj_out", "out.2")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


class Prompts:
    """Every prompt as the toy's text encoders give it, the empty one last."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = make_checkpoint(Path(folder) / "toy.safetensors")
            clip = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False)[1]
            texts = [*(subject.prompt for subject in SUBJECTS), ""]
            encoded = [clip.encode_from_tokens(clip.tokenize(t), return_pooled=True) for t in texts]
            pooled = torch.cat([pooled for _, pooled in encoded])
            size = {"width": 8 * EDGE, "height": 8 * EDGE, "device": "cpu"}
            vectors = model.encode_adm(pooled_output=pooled, **size)
        self.context = torch.cat([context for context, _ in encoded]).float().to(device)
        self.vectors = vectors.float().to(device)


class Training:
    """Everything that changes from step to step."""

    def __init__(self, device: str) -> None:
        self.device, self.step = device, 0
        self.model = build()
        self.prompts = Prompts(self.model, device)
        self.model.to(device)
        self.unet = self.model.diffusion_model.train().requires_grad_(True)
        self.averaged = copy.deepcopy(self.unet).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.generator = torch.Generator().manual_seed(SEED)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, noise, steps of the schedule and numbers of prompts."""
        numbers = torch.randint(len(SUBJECTS), (BATCH,), generator=self.generator)
        latents = to_latent(draw([SUBJECTS[i] for i in numbers], self.generator))
        noise = torch.randn(latents.shape, generator=self.generator)
        times = torch.randint(1000, (BATCH,), generator=self.generator)
        dropped = torch.rand(BATCH, generator=self.generator) < UNCONDITIONED
        numbers = torch.where(dropped, len(SUBJECTS), numbers)
        return tuple(value.to(self.device) for value in (latents, noise, times, numbers))

    def cycle(self) -> tuple[float, float]:
        """The present rate of learning, and the largest weight of an error."""
        step = self.step
        for steps, rate, end, limit in CYCLES:
            if step < steps:
                return rate * (1 + math.cos(math.pi * step / end)) / 2, limit
            step -= steps
        return 0.0, limit

    def loss(self, limit: float) -> torch.Tensor:
        latents, noise, times, numbers = self.batch()
        sampling = self.model.model_sampling
        sigma = sampling.sigmas[times]
        noised = latents + noise * sigma[:, None, None, None]
        predicted = self.unet(
            sampling.calculate_input(sigma, noised),
            times.float(),
            context=self.prompts.context[numbers],
            y=self.prompts.vectors[numbers],
        )
        weight = (1 + (sigma / DEVIATION).square()).clamp(max=limit)
        return ((predicted - noise).square().mean((1, 2, 3)) * weight).mean()

    def advance(self) -> float:
        rate, limit = self.cycle()
        rate *= min(1, (self.step + 1) / WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(limit)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % AVERAGE_EVERY == 0:
            self.average()
        return loss.item()

    def average(self) -> None:
        """Follow the weights, more closely in the beginning, when they still change much."""
        share = max(1 - AVERAGED**AVERAGE_EVERY, 10 / (self.step + 10))
        pairs = zip(self.averaged.parameters(), self.unet.parameters(), strict=True)
        for averaged, current in pairs:
            averaged.lerp_(current.detach(), share)

    def save(self, out: Path, state: Path) -> None:
        """The averaged weights in FP16, and all that it takes to go on."""
        weights = {name: value.half() for name, value in self.averaged.state_dict().items()}
        state.parent.mkdir(parents=True, exist_ok=True)
        temporary = state.with_suffix(".tmp")
        parts = {
            "unet": self.unet.state_dict(), "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
            "step": self.step,
        }  # fmt: skip
        torch.save(parts, temporary)
        temporary.replace(state)
        save_file(weights, out, metadata={"format": "pt", "steps": str(self.step)})

    def resume(self, state: Path) -> None:
        parts = torch.load(state, map_location=self.device, weights_only=True)
        self.unet.load_state_dict(parts["unet"])
        self.averaged.load_state_dict(parts["averaged"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.generator.set_state(parts["generator"].cpu())
        self.step = parts["step"]


def main() -> None:
    training = Training(chosen.device)
    if chosen.state.exists():
        training.resume(chosen.state)
    count = sum(value.numel() for value in training.unet.parameters())
    print(f"{count} parameters, step {training.step} of {chosen.steps}", flush=True)
    began, losses = time.monotonic(), []
    while training.step < chosen.steps:
        losses.append(training.advance())
        if training.step % SAVE_EVERY == 0 or training.step == chosen.steps:
            training.save(chosen.out, chosen.state)
            mean = sum(losses) / len(losses)
            print(f"{training.step:6} {mean:.4f} {time.monotonic() - began:.0f} s", flush=True)
            losses.clear()


if __name__ == "__main__":
    main()
