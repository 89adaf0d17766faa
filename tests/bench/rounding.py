"""How close pictures come by each way of rounding, with what chance alone makes of it.

Rounded weights are put into the 16-bit model. Each way has several draws: amax is moved a little,
which rounds every weight anew. Differences below a few deviations mean nothing. With `--unet`, of
another UNet of SDXL's blocks, on the toy's text encoders.
"""

import common

chosen = common.arguments(
    __doc__,
    trained=True,
    unet={"metavar": "FILE", "help": "a UNet's tensors alone, trained on the toy's pictures"},
    pictures={"type": int, "default": 16},
    recorded={"type": int, "default": 64, "help": "pictures for statistics and sketches"},
    steps={"type": int, "default": 12},
    cfg={"type": float, "default": 5.0},
    batch={"type": int, "default": 8},
    draws={"type": int, "default": 4},
    only={"nargs": "*", "help": "which ways; default: all"},
)

import statistics  # noqa: E402

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from _methods import METHODS, Method, Rounder  # noqa: E402
from _sampling import Latents, Sampler, noise_ratios, similarities  # noqa: E402
from _sketches import Sketches  # noqa: E402
from comfy import model_detection, supported_models  # noqa: E402
from hswq.calibration import DualMonitor  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from toy import drawing  # noqa: E402
from toy.checkpoint import checkpoint_tensors  # noqa: E402
from toy.nodes.toy_sdxl import TrainedToySDXL  # noqa: E402

RECORDED_SEED = 1_000_000  # far from the compared pictures' own


def checkpoint() -> str:
    """Return the checkpoint's path; of a UNet alone, one is made that ComfyUI recognises."""
    if chosen.unet is None:
        return chosen.checkpoint
    tensors = {
        name: value.half() for name, value in checkpoint_tensors(0, load_file(chosen.unet)).items()
    }
    config = model_detection.detect_unet_config(tensors, "model.diffusion_model.")
    differs = {key: config[key] for key in ("model_channels", "transformer_depth")}

    class OtherSize(TrainedToySDXL):
        unet_config = {**TrainedToySDXL.unet_config, **differs}  # noqa: RUF012

    supported_models.models.append(OtherSize)
    path = common.ROOT / ".dev/bench/other_sdxl.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return str(path)


def wanted(pictures: int, seed: int) -> Latents:
    """Return prompts and seeds; those from different seeds have nothing in common."""
    order = torch.randperm(
        len(drawing.SUBJECTS), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    prompts = [drawing.SUBJECTS[order[i % len(order)]].prompt for i in range(pictures)]
    return Latents(prompts, range(seed, seed + pictures))


class Comparison:
    """The 16-bit model's pictures, and how far another's are from them."""

    def __init__(self, patcher, sampler: Sampler) -> None:
        self._patcher, self._sampler = patcher, sampler
        self._latents, self._pictures = self._sample()

    def _sample(self) -> tuple:
        latents = self._sampler.sample(self._patcher, wanted(chosen.pictures, 0))
        # The toy's VAE shows a latent pixel as a square of eight.
        return latents, self._sampler.pictures(latents, 8)

    def draw(self) -> dict[str, float]:
        """Return figures of the weights as they are now."""
        latents, pictures = self._sample()
        difference = (latents - self._latents).flatten(1).norm(dim=1)
        ratios = noise_ratios(pictures, self._pictures)
        alike = similarities(pictures, self._pictures)
        return {
            "PSNR": statistics.mean(ratios), "PSNR worst": min(ratios),
            "SSIM": statistics.mean(alike), "SSIM worst": min(alike),
            "latent error": (difference / self._latents.flatten(1).norm(dim=1)).median().item(),
        }  # fmt: skip


def row_of(method: Method, rounder: Rounder, comparison: Comparison) -> dict[str, str]:
    """Return mean and deviation of each figure over the draws."""
    draws = []
    for draw in range(chosen.draws):
        with rounder.rounded(method, draw) as error:
            draws.append(comparison.draw() | {"layer error": error})
    row = {"kept": f"{rounder.bytes_kept(method):.2%}"}
    for key in draws[0]:
        digits = 2 if key.startswith("PSNR") else 5
        values = [one[key] for one in draws]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        row[key] = f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
    return row


def record(patcher, sampler: Sampler) -> Rounder:
    """Return what rounds, from other seeds' and prompts' pictures."""
    model = patcher.model.diffusion_model
    with DualMonitor(model, 0.1) as monitor, Sketches(model) as sketches:
        sampler.sample(patcher, wanted(chosen.recorded, RECORDED_SEED))
    return Rounder(model, monitor.statistics(), sketches.found)


def main() -> None:
    with torch.inference_mode():
        patcher, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            checkpoint(), model_options={"dtype": torch.float16}
        )
        size = 8 * drawing.EDGE
        sampler = Sampler(
            clip, vae, size=size, steps=chosen.steps, cfg=chosen.cfg, batch=chosen.batch
        )
        comparison, rounder = Comparison(patcher, sampler), record(patcher, sampler)
        results = {}
        for name, method in METHODS.items():
            if not chosen.only or name in chosen.only:
                results[name] = row_of(method, rounder, comparison)
                print(f"{name}: {results[name]}", flush=True)
    common.report("pictures by way of rounding", chosen, results)


main()
