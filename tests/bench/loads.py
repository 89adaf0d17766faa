"""What each load of a checkpoint leaves in memory: by stock ComfyUI, by ours, and by reading alone.

safetensors 0.8.0 leaves an integer or two behind with each tensor that it reads. ComfyUI reads its
files by it, and our loader leaves the reading of checkpoints to ComfyUI.
"""

import common

chosen = common.arguments(
    __doc__, count={"type": int, "default": 100, "help": "loads of each kind, after ten more"}
)

import gc  # noqa: E402

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import safetensors  # noqa: E402
from harness import hostmemory  # noqa: E402
from hswq.loader.engine.loading import load_checkpoint  # noqa: E402

WARM_UP = 10


def read() -> None:
    """As comfy.utils.load_torch_file does."""
    with safetensors.safe_open(chosen.checkpoint, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            file.get_tensor(name)


def stock() -> None:
    comfy.sd.load_checkpoint_guess_config(chosen.checkpoint, output_clip=False, output_vae=False)


def main() -> None:
    known = common.made_up_statistics(
        comfy.sd.load_checkpoint_guess_config(
            chosen.checkpoint, output_clip=False, output_vae=False
        )[0]
    )
    plan = load_checkpoint(chosen.checkpoint, common.planner(known), only_model=True)[0]
    plan = plan.get_attachment("hswq")

    def ours() -> None:
        load_checkpoint(chosen.checkpoint, plan, only_model=True)

    results = {}
    for kind in (read, stock, ours, stock, ours, read):
        for _ in range(WARM_UP):
            kind()
        before = measure()
        for _ in range(chosen.count):
            kind()
        after = measure()
        name = kind.__name__ if kind.__name__ not in results else f"{kind.__name__} again"
        results[name] = {key: (after[key] - before[key]) / chosen.count for key in before}
        results[name]["host MB by then"] = after["host bytes"] / 1e6
    with safetensors.safe_open(chosen.checkpoint, framework="pt") as file:
        print(f"{len(file.keys())} tensors in the file; of each load:")
    common.report("loads", chosen, results)


def measure() -> dict:
    """Return Python's blocks, what C code holds, and anonymous bytes when what is free is back."""
    comfy.model_management.unload_all_models()
    gc.collect()
    held = hostmemory.allocated()
    return {
        "blocks": held["blocks"],
        "C bytes": held["in use MB"] * 1e6,
        "host bytes": hostmemory.trimmed(),
    }


main()
