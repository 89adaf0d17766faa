"""How close a quantized model's pictures come to the 16-bit model's: the table, plot and sheet.

By default of the trained toy. A full-size checkpoint is sampled by prompts for it, on a GPU which
has room for the 16-bit model and a quantized one beside it.
"""

import common

chosen = common.arguments(
    __doc__,
    trained=True,
    pictures={"type": int, "default": 64},
    recorded={"type": int, "default": 64, "help": "pictures for the statistics"},
    size={"type": int, "help": "in pixels; default: 1024, the toy's own for the toy"},
    steps={"type": int, "default": 20},
    cfg={"type": float, "default": 5.0},
    batch={"type": int, "default": 8},
    docs={"metavar": "FOLDER", "help": "write the plot and the sheet there, of all variants"},
    only={"nargs": "*", "help": "which variants; default: all"},
)

from pathlib import Path  # noqa: E402

import _figures  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from _layers import layer_errors, unet_bytes, weighted_error  # noqa: E402
from _sampling import (  # noqa: E402
    SUBJECTS,
    Latents,
    Sampler,
    cosines,
    noise_ratios,
    similarities,
)
from _variants import variants  # noqa: E402
from hswq.calibration import DualMonitor  # noqa: E402
from toy import drawing  # noqa: E402
from toy.nodes.toy_sdxl import ToySDXL  # noqa: E402

OF_LAYERS = 2  # pictures whose layers' inputs are compared
RECORDED_SEED = 1_000_000  # far from the compared pictures' own


def wanted(pictures: int, toy: bool, seed: int) -> Latents:
    """Return prompts and seeds; those from different seeds have nothing in common."""
    if toy:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(drawing.SUBJECTS), generator=generator).tolist()
        prompts = [drawing.SUBJECTS[i].prompt for i in order]
    else:
        prompts = list(SUBJECTS)
    prompts = [prompts[i % len(prompts)] for i in range(pictures)]
    return Latents(prompts, range(seed, seed + pictures))


def mean_and_worst(name: str, values: list[float], digits: int) -> dict[str, float]:
    return {
        name: round(sum(values) / len(values), digits),
        f"{name} worst": round(min(values), digits),
    }


class Comparison:
    """The 16-bit model's pictures, and what is needed to compare others with them."""

    def __init__(self, reference, sampler: Sampler, compared: Latents, toy: bool) -> None:
        self.reference, self.sampler, self.compared = reference, sampler, compared
        self.every = 8 if toy else 1  # the toy's VAE shows a latent pixel as a square of eight
        self.latents = sampler.sample(reference, compared)
        self.pictures = sampler.pictures(self.latents, self.every)

    def measure(self, patcher, measured) -> tuple[dict[str, float], list, list[float]]:
        """Return a row of the table, the pictures and each one's SSIM."""
        latents = self.sampler.sample(patcher, self.compared)
        pictures = self.sampler.pictures(latents, self.every)
        few = Latents(*(part[:OF_LAYERS] for part in self.compared))
        errors = layer_errors(
            self.reference, patcher, lambda: self.sampler.sample(self.reference, few)
        )
        alike = similarities(pictures, self.pictures)
        row = {
            "MB": round(unet_bytes(patcher) / 1e6, 3),
            **mean_and_worst("SSIM", alike, 4),
            **mean_and_worst("PSNR", noise_ratios(pictures, self.pictures), 2),
            **mean_and_worst("cosine", cosines(latents, self.latents), 5),
            "layer error": round(sum(errors.values()) / len(errors), 5),
            "layer error worst": round(max(errors.values()), 5),
            "weighted MSE": round(weighted_error(self.reference, patcher, measured), 7),
        }
        return row, pictures, alike


def record(reference, sampler: Sampler, toy: bool):
    """Return statistics of other seeds' pictures."""
    with DualMonitor(reference.model.diffusion_model) as monitor:
        sampler.sample(reference, wanted(chosen.recorded, toy, RECORDED_SEED))
    return monitor.statistics()


def main() -> None:
    with torch.inference_mode():
        reference, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            chosen.checkpoint, model_options={"dtype": torch.float16}
        )
        toy = isinstance(reference.model.model_config, ToySDXL)
        chosen.size = chosen.size or (8 * drawing.EDGE if toy else 1024)
        sampler = Sampler(
            clip, vae, size=chosen.size, steps=chosen.steps, cfg=chosen.cfg, batch=chosen.batch
        )
        comparison = Comparison(reference, sampler, wanted(chosen.pictures, toy, 0), toy)
        measured = record(reference, sampler, toy)
        results = {"FP16": {"MB": round(unet_bytes(reference) / 1e6, 3)}}
        pictures, alike = {"FP16": comparison.pictures}, {}
        for name, make in variants(chosen.checkpoint, reference, measured).items():
            if chosen.only and name not in chosen.only:
                continue
            results[name], made, alike[name] = comparison.measure(make(), measured)
            if name in _figures.SHOWN:
                pictures[name] = made
            print(f"{name}: SSIM {results[name]['SSIM']}", flush=True)
    common.report("fidelity", chosen, results)
    print(_figures.markdown(results))
    if chosen.docs and not chosen.only:
        _figures.plot(results, Path(chosen.docs) / "fidelity.png")
        _figures.sheet(pictures, alike, Path(chosen.docs) / "fidelity_pictures.png")


main()
