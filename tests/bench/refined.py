"""What a full-size model takes that was recorded: rounding, loading it again, effects, LoRAs.

Loading is timed to the end of the first step, from the cache of refined models against stock
ComfyUI's FP16, in turn. Peaks are of GPU memory, and include what was there before.
"""

import common

chosen = common.arguments(
    __doc__,
    size={"type": int, "default": 1024},
    recorded_size={"type": int, "default": 512},
    effect_size={"type": int, "default": 512},
    rounds={"type": int, "default": 3},
    profile={"metavar": "FILE", "help": "write what Python does while it loads from the cache"},
    only={"nargs": "*", "help": "rounding, loading, effect, lora; default: all"},
)

import dataclasses  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from _recording import Recording, recorded  # noqa: E402
from _small import profiled  # noqa: E402
from harness.inprocess import distance  # noqa: E402
from hswq.loader.engine.adopt import ATTACHMENT  # noqa: E402
from hswq.loader.engine.loading import load_checkpoint  # noqa: E402
from hswq.loader.engine.patchers import quantized_layers  # noqa: E402
from hswq.loader.files.model_file import ModelFile  # noqa: E402
from hswq.loader.host import settings  # noqa: E402
from hswq.loader.jobs import choice  # noqa: E402
from hswq.loader.jobs.effect import measure_effects  # noqa: E402
from hswq.loader.jobs.keeping import BY_EFFECT, Keeping, choose_keeping  # noqa: E402
from hswq.loader.jobs.sampling import Picture  # noqa: E402
from hswq.loader.recording.unrecorded import unrecorded  # noqa: E402
from hswq.quant import QuantizeSettings  # noqa: E402

SETTINGS = QuantizeSettings(compensated=True)
NONE_KEPT = Keeping(0.0)


def peak(function) -> dict[str, float]:
    """Call it; return the seconds, and torch's largest GPU memory in GiB."""
    if chosen.device != "cuda":
        return {"s": round(common.wall(function), 2)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds, most = common.wall(function), torch.cuda.max_memory_allocated()
    return {
        "s": round(seconds, 2),
        "GPU peak GiB": round(most / 2**30, 2),
        "of it new GiB": round((most - before) / 2**30, 2),
    }


def choose(keeping: Keeping = NONE_KEPT) -> choice.Choice:
    file = ModelFile(chosen.checkpoint)
    return choose_keeping(choice.AUTO, file, SETTINGS, keeping, choice.FAIL)


def load(keeping: Keeping = NONE_KEPT, keep: bool = False):
    """Load as the loader node does."""
    its = choose(keeping)
    patcher = load_checkpoint(chosen.checkpoint, its.decider, only_model=True)[0]
    its.keep(patcher.get_attachment(ATTACHMENT))
    if keep:
        its.keep_rounded(quantized_layers(patcher))
    return patcher


def stock():
    return comfy.sd.load_checkpoint_guess_config(
        chosen.checkpoint, output_vae=False, output_clip=False,
        model_options={"dtype": torch.float16},
    )[0]  # fmt: skip


def step(patcher) -> torch.Tensor:
    return common.Sampling(patcher, chosen.size)(1)


def rounding() -> dict[str, dict]:
    """Search and round all layers for the first time, then write what came of it."""
    results, made = {}, []
    results["first load: search and round"] = peak(lambda: made.append(load()))
    its = choose()
    results["write it"] = peak(lambda: its.keep_rounded(quantized_layers(made[0])))
    return results


def loading() -> dict[str, dict]:
    """Load again to the end of the first step."""
    loaders = {"FP16": stock, "refined, from the cache": load}
    found = {name: [] for name in loaders}
    for name in list(loaders) * chosen.rounds:
        common.unload()
        common.read_once(chosen.checkpoint)
        found[name].append(peak(lambda name=name: step(loaders[name]())))
    if chosen.profile:
        common.unload()
        profiled(lambda: step(load()), Path(chosen.profile))
    return {
        f"{name}, to the end of step 1": {
            key: common.median([one[key] for one in rounds]) for key in rounds[0]
        }
        for name, rounds in found.items()
    }


def picture(reference, size: int) -> Picture:
    sampling = common.Sampling(reference, size)
    latent = {"samples": torch.zeros(1, 4, size // 8, size // 8)}
    return Picture(sampling._positive, sampling._negative, latent, cfg=7.0)


def effect() -> dict[str, dict]:
    """Estimate effects, then measure them."""
    results = {}
    by_effect = Keeping(selection=BY_EFFECT)
    results["effects estimated, choice"] = peak(lambda: choose(by_effect))
    reference = stock()
    step(reference)
    for size in dict.fromkeys((chosen.effect_size, chosen.size)):
        its = picture(reference, size)
        settings_of = (
            SETTINGS
            if size == chosen.effect_size
            else dataclasses.replace(SETTINGS, compensated=False)
        )
        results[f"effects measured at {size}"] = peak(
            lambda its=its, settings_of=settings_of: print(
                measure_effects(unrecorded(reference), its, 0, choice.AUTO, settings_of)
            )
        )
    return results


def lora() -> dict[str, dict]:
    """From a LoRA's new strength to the end of the next step; and how exact it is."""
    reference, patcher = stock(), load()
    step(patcher)
    keys = [f"diffusion_model.{name}.weight" for name in patcher.get_attachment(ATTACHMENT).layers]
    file = _lora(patcher, keys)
    results, strength = {}, 0.0
    for compensated in (False, True) * chosen.rounds:
        _compensate(compensated)
        strength += 0.01
        changed = comfy.sd.load_lora_for_models(patcher, None, file, strength, 0.0)[0]
        row = peak(lambda changed=changed: step(changed))
        name = f"LoRA, {'compensated' if compensated else 'nearest'}"
        results[name] = min(results.get(name, row), row, key=lambda one: one["s"])
    for compensated in (False, True):
        _compensate(compensated)
        outputs = [
            step(comfy.sd.load_lora_for_models(one, None, file, 0.5, 0.0)[0])
            for one in (patcher, reference)
        ]
        name = f"LoRA, {'compensated' if compensated else 'nearest'}"
        results[name] = {**results[name], "latent error": round(distance(*outputs), 5)}
    return results


def _compensate(wanted: bool) -> None:
    chosen_now = dataclasses.replace(settings.Settings(), compensate_loras=wanted)
    settings.current = lambda: chosen_now


def _lora(patcher, keys: list[str], rank: int = 16) -> dict[str, torch.Tensor]:
    """Return a LoRA on the Linear layers of all transformer blocks."""
    tensors = {}
    weights = patcher.model.state_dict()
    for number, key in enumerate(keys):
        shape = weights[key].shape
        if "transformer_blocks" not in key or len(shape) != 2:
            continue
        generator = torch.Generator().manual_seed(number)
        name = "lora_unet_" + key.removeprefix("diffusion_model.")[: -len(".weight")].replace(
            ".", "_"
        )
        tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.02
        tensors[f"{name}.lora_down.weight"] = (
            torch.randn(rank, shape[1], generator=generator) * 0.02
        )
    return tensors


def main() -> None:
    parts = {"rounding": rounding, "loading": loading, "effect": effect, "lora": lora}
    with torch.inference_mode():
        reference = stock()
        sampler = SimpleNamespace(
            sample=lambda patcher, wanted: [
                common.Sampling(patcher, chosen.recorded_size)(8) for _ in wanted.seeds
            ]
        )
        with recorded(reference, Recording([""], sampler, 32)):
            del reference
            results = {}
            for name, part in parts.items():
                if not chosen.only or name in chosen.only or name == "rounding":
                    results |= part()
                    print(results, flush=True)
    common.report("a recorded model", chosen, results)


main()
