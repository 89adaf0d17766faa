"""A step, and loading, on a GPU that is too small: all but some GiB of it are taken."""

import common

chosen = common.arguments(
    __doc__,
    free={"type": float, "nargs": "+", "default": [3.0, 4.5], "help": "GiB that are left"},
    keep={"type": float, "nargs": "*", "default": [0.25, 0.0]},
    size={"type": int, "default": 1024},
    batch={"type": int, "default": 2, "choices": [1, 2], "help": "2 is one picture with cfg"},
    steps={"type": int, "default": 4},
    rounds={"type": int, "default": 1},
    lora={"action": "store_true", "help": "with a LoRA of rank 16 on all Linear layers"},
    controlnet={"action": "store_true", "help": "with a ControlNet of SDXL's size beside it"},
    profile={"metavar": "FOLDER", "help": "write there what Python does in a step of each"},
    profile_load={"metavar": "FOLDER", "help": "the same of loading and the first step"},
    only={"nargs": "*", "help": "which variants"},
)

from pathlib import Path  # noqa: E402

import comfy.model_management as memory  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from _small import Ballast, Steps, measured_load, profiled, with_lora  # noqa: E402
from _trace import summary, traced  # noqa: E402
from comfy.patcher_extension import CallbacksMP  # noqa: E402
from hswq.loader.engine.adopt import ATTACHMENT  # noqa: E402
from hswq.loader.engine.loading import load_checkpoint  # noqa: E402


def stock(**model_options):
    return comfy.sd.load_checkpoint_guess_config(
        chosen.checkpoint, output_clip=False, output_vae=False, model_options=model_options
    )[0]


def searched(measured, keep: float):
    """Load one with a search. The first one also compiles kernels, where a machine has none."""
    return load_checkpoint(chosen.checkpoint, common.planner(measured, keep), only_model=True)[0]


def ours(plan, **how):
    return load_checkpoint(chosen.checkpoint, plan, only_model=True, **how)[0]


def in_comfyuis_order(patcher):
    """Return a MODEL of ours that keeps the layers on the GPU that stock would keep."""
    patcher.remove_callbacks_with_key(CallbacksMP.ON_CLONE, "hswq")
    patcher.__class__ = type(patcher).__mro__[2]
    return patcher


def loaders() -> dict:
    """Return what loads each variant. Plans are made once, with all memory free."""
    reference = stock()
    measured = common.made_up_statistics(reference)
    found = {"FP16": stock, "stock FP8 cast": lambda: stock(dtype=torch.float8_e4m3fn)}
    plans = {}
    for keep in chosen.keep:
        made = []
        seconds = common.wall(lambda made=made, keep=keep: made.append(searched(measured, keep)))
        print(f"keep {keep:g}, loaded with a search and all memory: {seconds:.2f} s", flush=True)
        plans[keep] = made.pop().get_attachment(ATTACHMENT)
        common.unload()
        found[f"ours {keep:g}"] = lambda keep=keep: ours(plans[keep])
    plan = plans[chosen.keep[0]]
    found["ours, stock order"] = lambda: in_comfyuis_order(ours(plan, to_host=True))
    return {name: load for name, load in found.items() if not chosen.only or name in chosen.only}


def measure(free: float, makers: dict) -> dict[str, dict]:
    """Return each variant's figures with so many GiB left."""
    rows, models = {}, {}
    for name, make in makers.items():
        common.unload()
        common.read_once(chosen.checkpoint)
        ballast = Ballast(free)
        profile = profile_of(chosen.profile_load, f"{free:g} {name} load")
        loaded, steps = measured_load(lambda make=make: steps_of(make()), profile)
        models[name] = steps
        rows[name] = {**loaded, **sampled(f"{free:g} {name}", steps)}
        ballast.drop()
        print(free, name, rows[name], flush=True)
    for _ in range(1, chosen.rounds):
        for name, steps in models.items():
            common.unload()
            ballast = Ballast(free)
            rows[name]["seconds"] += steps.run(chosen.steps + 1)[1:]
            ballast.drop()
    first = rows[next(iter(rows))]["seconds"]
    for row in rows.values():
        seconds = row.pop("seconds")
        row["step s"] = round(common.median(seconds), 4)
        row["fastest s"] = round(min(seconds), 4)
        row["vs first"] = round(common.median(seconds) / common.median(first), 3)
        row["fastest vs first"] = round(min(seconds) / min(first), 3)
    return rows


def steps_of(patcher) -> Steps:
    patcher = with_lora(patcher) if chosen.lora else patcher
    return Steps(patcher, chosen.size, chosen.batch, controlnet=chosen.controlnet)


def sampled(name: str, steps: Steps) -> dict:
    """Return a sampling's figures: seconds of its steps, what one moves, memory."""
    before, events, around = retries(), [], {}
    if chosen.device == "cuda":
        around[chosen.steps + 1] = lambda step: events.extend(traced(step))
    profile = profile_of(chosen.profile, name)
    if profile:
        around[chosen.steps + 2] = lambda step: profiled(step, profile)
    # The first step has the way to the GPU in it, the last two are traced and profiled.
    seconds = steps.run(chosen.steps + 3, around)[1 : chosen.steps + 1]
    found = {
        "seconds": seconds,
        "calls a step": steps.calls / (chosen.steps + 3),
        "retries": retries() - before,
        "on GPU GiB": round(steps.patcher.loaded_size() / 2**30, 2),
        "registered GiB": round(memory.TOTAL_PINNED_MEMORY / 2**30, 2),
        **(summary(events) if events else {}),
    }
    found["GiB/s"] = round(found.get("up MiB", 0) / 1024 / common.median(seconds), 1)
    return found


def profile_of(folder: str | None, name: str) -> Path | None:
    mode = "dynamic" if chosen.dynamic else "legacy"
    file = f"{mode} {name}.txt".replace(",", "").replace(" ", "_")
    return Path(folder) / file if folder else None


def retries() -> int:
    """Return how often torch has found no memory, and has given back all that it kept."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if chosen.device == "cuda" else 0


def main() -> None:
    with torch.inference_mode():
        makers = loaders()
        for free in chosen.free:
            rows = measure(free, makers)
            details = {key for row in rows.values() for key in row if isinstance(row[key], dict)}
            for row in rows.values():
                for key in details:
                    row.pop(key, None)
            common.report(f"{free:g} GiB free, batch {chosen.batch}", chosen, rows)


main()
