"""How close quantized models' pictures come to the 16-bit model's, with what chance makes of it.

All goes the user's way: passive recording, statistics and sketches on disk, the loader. Pictures
that are compared have other prompts and seeds than those that were recorded. Each method has
several draws: in all but the first, every amax is moved a little, which rounds every weight anew.
A difference of less than a few deviations means nothing. `--recordings` compares recordings
instead of methods; each draw of those is recorded anew.
"""

import time

import common

chosen = common.arguments(
    __doc__,
    trained=True,
    # A VAE in BF16 rounds pictures to 8 bits, and small distances look larger than they are.
    comfyui=["--fp32-vae"],
    unet={"metavar": "FILE", "help": "a UNet's tensors alone, trained on the toy's pictures"},
    pictures={"type": int, "default": 64},
    recorded={"type": int, "default": 64, "help": "pictures that are recorded, 32 at least"},
    size={"type": int, "help": "in pixels; default: 1024, for the toy 192 (at least 96)"},
    steps={"type": int, "default": 20},
    cfg={"type": float, "default": 5.0},
    batch={"type": int, "default": 16, "help": "pictures at once that are compared"},
    recorded_batch={"type": int, "default": 1, "help": "pictures at once that are recorded"},
    draws={"type": int, "default": 4},
    only={"nargs": "*", "help": "which methods or recordings; default: all"},
    recordings={"action": "store_true", "help": "compare recordings"},
    markdown={"action": "store_true", "help": "print the table for docs/fidelity.md"},
    sheet={"metavar": "FILE", "help": "write a PNG of some methods' pictures and differences"},
)

import gc  # noqa: E402
from pathlib import Path  # noqa: E402

import _models  # noqa: E402
import _table  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from _comparison import Comparison, Measured  # noqa: E402
from _methods import METHODS, SMALL, Loader, Method  # noqa: E402
from _recording import Recording, recorded  # noqa: E402
from _sampling import How, Latents, Sampler  # noqa: E402
from hswq.calibration import StatisticsError  # noqa: E402
from hswq.loader.jobs.sampling import Picture  # noqa: E402
from toy import drawing  # noqa: E402
from toy.nodes.toy_sdxl import ToySDXL  # noqa: E402

OF_EFFECT = 4
"""Prompts in the batch that effects are measured with."""


class Benchmark:
    """One 16-bit model, and all that others are compared by."""

    def __init__(self) -> None:
        """Load it and sample the pictures to compare with."""
        if chosen.unet is not None:
            path = common.ROOT / ".dev/bench/other_sdxl.safetensors"
            chosen.checkpoint = _models.with_toy_encoders(chosen.unet, path)
        self.reference, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            chosen.checkpoint, model_options={"dtype": torch.float16}
        )
        toy = isinstance(self.reference.model.model_config, ToySDXL)
        self.prompts, self.others = _models.prompts(toy)
        chosen.size = chosen.size or (8 * drawing.EDGE if toy else 1024)
        self.how = How(chosen.size, chosen.steps, chosen.cfg, chosen.batch)
        self._encoders = clip, vae
        numbers = range(chosen.pictures)
        wanted = Latents([self.prompts[i % len(self.prompts)] for i in numbers], numbers)
        every = 8 if toy else 1  # the toy's VAE shows a latent pixel as a square of eight
        self.comparison = Comparison(self.reference, Sampler(clip, vae, self.how), wanted, every)
        self.loader = Loader(chosen.checkpoint, self.reference, self._measured_by())

    def _measured_by(self) -> Picture:
        """Return what effects are measured with: a few of the prompts that are recorded."""
        sampler, few, edge = (
            Sampler(*self._encoders, self.how),
            self.others[:OF_EFFECT],
            self.how.size,
        )
        latent = {"samples": torch.zeros(len(few), 4, edge // 8, edge // 8)}
        return Picture(
            sampler.encode(few), sampler.encode([""] * len(few)), latent, cfg=self.how.cfg
        )

    def recording(self, *, prompts: int | None = None, machines: int = 1, **how) -> Recording:
        """Return what is recorded: by default as the compared pictures are sampled."""
        its = self.how._replace(**{"batch": chosen.recorded_batch, **how})
        sampler = Sampler(*self._encoders, its)
        return Recording(self.others[:prompts], sampler, chosen.recorded, machines)

    def recordings(self) -> dict[str, Recording]:
        """Return the recordings that `--recordings` compares."""
        smaller = max(64, chosen.size * 2 // 3 // 64 * 64)
        return {
            "other prompts and seeds": self.recording(),
            "by two machines, merged": self.recording(machines=2),
            "one prompt alone": self.recording(prompts=1),
            "dpmpp_2m, karras": self.recording(sampler="dpmpp_2m", scheduler="karras"),
            f"{smaller} pixels, not {chosen.size}": self.recording(size=smaller),
        }

    def draw(self, name: str, method: Method | None, number: int) -> Measured:
        """Load and measure one draw, and tell of it."""
        began = time.perf_counter()
        patcher = self.loader.load(method, number)
        loaded = time.perf_counter()
        found = self.comparison.measure(patcher)
        del patcher
        gc.collect()
        took = f"loaded in {loaded - began:.1f} s, compared in {time.perf_counter() - loaded:.1f} s"
        print(f"{name}, draw {number}: {found.figures['PSNR']:.2f} dB; {took}", flush=True)
        return found


def wanted_of(known: dict) -> dict:
    return {name: one for name, one in known.items() if not chosen.only or name in chosen.only}


def compare_methods(benchmark: Benchmark) -> dict[str, dict]:
    """Return a row for each method, by one recording."""
    results, shown, alike = {}, {"16 bit": benchmark.comparison.pictures}, {}
    began = time.perf_counter()
    with recorded(benchmark.reference, benchmark.recording()):
        print(f"recorded in {time.perf_counter() - began:.1f} s", flush=True)
        for name, method in wanted_of(METHODS).items():
            draws = 1 if method is None or method.is_16_bit else chosen.draws
            found = [benchmark.draw(name, method, number) for number in range(draws)]
            results[name] = _table.row_of([one.figures for one in found])
            shown[name], alike[name] = found[0].pictures, found[0].alike
    if chosen.sheet and not chosen.only:
        import _figures  # needs matplotlib, which nothing else does

        _figures.sheet(shown, alike, Path(chosen.sheet))
    return results


def compare_recordings(benchmark: Benchmark) -> dict[str, dict]:
    """Return a row for each recording, of the method that keeps the ends alone."""
    results = {}
    for name, recording in wanted_of(benchmark.recordings()).items():
        found = []
        for number in range(chosen.draws):
            with recorded(benchmark.reference, recording, number):
                found.append(benchmark.draw(name, METHODS[SMALL], number).figures)
        results[name] = _table.row_of(found)
    return results


def main() -> None:
    with torch.inference_mode():
        benchmark = Benchmark()
        compare = compare_recordings if chosen.recordings else compare_methods
        try:
            results = compare(benchmark)
        except StatisticsError as error:
            raise SystemExit(f"too little was recorded: {error}") from error
    about = f"recordings, {SMALL}" if chosen.recordings else "fidelity"
    common.report(about, chosen, results)
    if chosen.markdown:
        print(_table.markdown(results))


main()
