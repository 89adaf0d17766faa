"""Many samplings with and without a LoRA on a GPU that is too small: memory and results."""

import common

chosen = common.arguments(
    __doc__,
    free={"type": float, "default": 4.5, "help": "GiB of the GPU that are left"},
    keep={"type": float, "default": 0.25},
    size={"type": int, "default": 1024},
    steps={"type": int, "default": 2},
    count={"type": int, "default": 200, "help": "samplings; the LoRA comes or goes each tenth"},
)

import gc  # noqa: E402

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from _small import Ballast, with_lora  # noqa: E402
from harness.hostmemory import anonymous  # noqa: E402
from hswq.loader.engine.loading import load_checkpoint  # noqa: E402

TURNS = 10


def measure(latents: dict[bool, list[torch.Tensor]]) -> dict:
    """Return what memory holds now, and how far equal samplings are apart."""
    common.synchronize()
    gc.collect()
    apart = {
        with_it: max((one - found[0]).norm() / found[0].norm() for one in found).item()
        for with_it, found in latents.items()
        if found
    }
    row = {
        "host MB": round(anonymous() / 1e6),
        **{f"apart, LoRA {with_it}": f"{value:.1e}" for with_it, value in apart.items()},
    }
    if chosen.device == "cuda":
        row["GPU MB"] = round(torch.cuda.memory_allocated() / 1e6)
        row["GPU reserved MB"] = round(torch.cuda.memory_reserved() / 1e6)
    return row


def main() -> None:
    results, latents = {}, {False: [], True: []}
    with torch.inference_mode():
        reference = comfy.sd.load_checkpoint_guess_config(
            chosen.checkpoint, output_clip=False, output_vae=False
        )[0]
        measured = common.made_up_statistics(reference)
        del reference
        common.unload()
        ballast = Ballast(chosen.free)
        plain = load_checkpoint(
            chosen.checkpoint, common.planner(measured, chosen.keep), only_model=True
        )[0]
        samplings = [common.Sampling(one, chosen.size) for one in (plain, with_lora(plain))]
        for number in range(1, chosen.count + 1):
            with_it = bool((number - 1) // TURNS % 2)
            latents[with_it].append(samplings[with_it](chosen.steps).cpu())
            if number == 2 * TURNS or number % 50 == 0 or number == chosen.count:
                results[f"after {number}"] = measure(latents)
                print(number, results[f"after {number}"], flush=True)
        ballast.drop()
    common.report(f"samplings with {chosen.free:g} GiB free", chosen, results)


main()
