"""Loading to the end of the first step, and the memory it takes, against stock ComfyUI's FP16."""

import common

chosen = common.arguments(
    __doc__,
    size={"type": int, "default": 1024},
    rounds={"type": int, "default": 3},
    mode={"default": "scaled", "help": "the number format"},
    first={"action": "store_true", "help": "the first load of a process; see TRITON_CACHE_DIR"},
    late={"action": "store_true", "help": "compile no kernel in the background"},
)

import contextlib  # noqa: E402

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from harness.hostmemory import PeakMemory  # noqa: E402
from hswq.loader.engine import quantizer  # noqa: E402
from hswq.loader.engine.adopt import ATTACHMENT  # noqa: E402
from hswq.loader.engine.ahead import Ahead  # noqa: E402
from hswq.loader.engine.loading import load_checkpoint  # noqa: E402
from hswq.quant import Planner  # noqa: E402


def main() -> None:
    if chosen.late:
        quantizer.compile_ahead = lambda *_: Ahead((), contextlib.nullcontext)
    with torch.inference_mode():
        reference = comfy.sd.load_checkpoint_guess_config(chosen.checkpoint)[0]
        measured = common.made_up_statistics(reference)

        def searching() -> Planner:
            return common.planner(measured, mode=chosen.mode)

        path = chosen.checkpoint
        common.Sampling(reference, chosen.size)(1)
        if chosen.first:
            del reference
            common.unload()
            found = once(lambda: load_checkpoint(path, searching())[0])
            return common.report("the first load", chosen, {"HSWQ, searching": found})
        warm = load_checkpoint(path, searching(), only_model=True)[0]
        common.Sampling(warm, chosen.size)(1)
        plan = warm.get_attachment(ATTACHMENT)
        del reference, warm
        loaders = {
            "FP16": lambda: comfy.sd.load_checkpoint_guess_config(path)[0],
            "HSWQ, searching": lambda: load_checkpoint(path, searching())[0],
            "HSWQ, plan cached": lambda: load_checkpoint(path, plan)[0],
        }
        found = {name: [] for name in loaders}
        order = list(loaders)
        for _ in range(chosen.rounds):
            for name in order:
                common.unload()
                found[name].append(once(loaders[name]))
            order.append(order.pop(0))  # who comes after whom matters: host pages are reused
    results = {}
    for name, rounds in found.items():
        rows = {key: [one[key] for one in rounds] for key in rounds[0]}
        results[name] = {key: round(common.median(values), 2) for key, values in rows.items()}
    return common.report("loading to the end of the first step", chosen, results)


def once(load) -> dict[str, float]:
    """Load and take one step."""
    made = []
    with PeakMemory() as host:
        seconds, gpu = peak_on_gpu(lambda: made.append(load()))
    first, gpu_with_step = peak_on_gpu(lambda: common.Sampling(made[0], chosen.size)(1))
    return {
        "load s": seconds, "first step s": first, "total s": seconds + first,
        "GPU peak GiB": gpu, "host peak GiB": host.bytes / 2**30,
        "GPU peak with step GiB": gpu_with_step, "weights GiB": made[0].model_size() / 2**30,
    }  # fmt: skip


def peak_on_gpu(function) -> tuple[float, float]:
    """Call it; return the seconds, and torch's largest GPU memory in GiB."""
    if chosen.device != "cuda":
        return common.wall(function), 0.0
    torch.cuda.reset_peak_memory_stats()
    return common.wall(function), torch.cuda.max_memory_allocated() / 2**30


main()
