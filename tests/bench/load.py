"""Loading to the end of the first step, and the memory it takes, against stock ComfyUI's FP16.

With --first it does once what a user does on a new machine: it records a sampling in 16 bit, waits
until what that began in the background has ended, and loads the model in FP16, then quantized.
Begin with an empty TRITON_CACHE_DIR.
"""

import common

chosen = common.arguments(
    __doc__,
    size={"type": int, "default": 1024},
    rounds={"type": int, "default": 3},
    mode={"default": "scaled", "help": "the number format"},
    first={
        "action": "store_true",
        "help": "the first load of a process, after a recorded sampling",
    },
    steps={"type": int, "default": 20, "help": "with --first: of FP16 while that runs, and after"},
    late={"action": "store_true", "help": "with --first: prepare nothing in the background"},
    compensated={"action": "store_true", "help": "with --first: compensated rounding, the default"},
    profile={"metavar": "FILE", "help": "with --first: write what Python does in the first one"},
)

import functools  # noqa: E402
from pathlib import Path  # noqa: E402

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from _recording import Recording, recorded  # noqa: E402
from _small import profiled  # noqa: E402
from harness.hostmemory import PeakMemory  # noqa: E402
from hswq.calibration.sketch import SIZE  # noqa: E402
from hswq.loader.engine import ahead  # noqa: E402
from hswq.loader.engine.adopt import ATTACHMENT  # noqa: E402
from hswq.loader.engine.loading import load_checkpoint  # noqa: E402
from hswq.loader.files.whole_hash import background  # noqa: E402
from hswq.loader.host.folders import statistics_folder  # noqa: E402
from hswq.quant import NUMBER_FORMATS, BySensitivity, Planner  # noqa: E402


def main() -> None:
    with torch.inference_mode():
        reference = comfy.sd.load_checkpoint_guess_config(chosen.checkpoint)[0]
        measured = common.made_up_statistics(reference)

        def searching() -> Planner:
            return common.planner(measured, mode=chosen.mode)

        path = chosen.checkpoint
        common.Sampling(reference, chosen.size)(1)
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
                common.read_once(path)
                found[name].append(once(loaders[name]))
            order.append(order.pop(0))  # who comes after whom matters: host pages are reused
    results = {}
    for name, rounds in found.items():
        rows = {key: [one[key] for one in rounds] for key in rounds[0]}
        results[name] = {key: round(common.median(values), 2) for key, values in rows.items()}
    common.report("loading to the end of the first step", chosen, results)


class OneStep:
    """A sampler for Recording."""

    def sample(self, patcher, _) -> None:
        """Take one step, whatever the prompt."""
        common.Sampling(patcher, chosen.size)(1)


@torch.inference_mode()
def first() -> None:
    """Record, wait, and load once in FP16 and twice quantized."""
    if chosen.late:
        ahead.prepare = lambda *_: None
    path = chosen.checkpoint
    model = comfy.sd.load_checkpoint_guess_config(path)[0]
    measured, sketches = common.made_up_statistics(model), None
    sample = functools.partial(common.Sampling(model, chosen.size), chosen.steps)
    sample()  # what is slow the first time in FP16 too
    with recorded(model, Recording([""], OneStep(), pictures=1)):
        if not list(statistics_folder().glob("*.pt")):
            print("The sampling was not recorded: are its values finite? Preparing without it.")
            ahead.prepare(torch.device(model.load_device), model.model.get_dtype())
        found = {"steps while preparing": {"total s": common.wall(sample)}}
        background.busy = lambda: False
        background.join()  # the file's hash
        background.busy = lambda: True
        prepared = ahead.wait()
        found["steps after that"] = {"total s": common.wall(sample)}
    parts = " + ".join(f"{seconds:.2f}" for seconds in prepared)
    found["prepared"] = {"total s": float(sum(prepared)), "parts": parts}
    if chosen.compensated:
        sketches = {
            name: torch.randn(SIZE, one.importance.numel()) for name, one in measured.items()
        }

    def searching() -> Planner:
        how = BySensitivity(0.25), NUMBER_FORMATS[chosen.mode]
        return Planner(measured, *how, sketches=sketches)

    loaders = {
        "FP16": lambda: comfy.sd.load_checkpoint_guess_config(path)[0],
        "HSWQ, first": lambda: load_checkpoint(path, searching())[0],
        "HSWQ, second": lambda: load_checkpoint(path, searching())[0],
    }
    del model, sample
    if chosen.profile:
        loaders["HSWQ, first"] = with_profile(loaders["HSWQ, first"], Path(chosen.profile))
    for name, load in loaders.items():
        common.unload()
        common.read_once(path)
        found[name] = once(load)
    for row in found.values():
        row.update({key: round(one, 2) for key, one in row.items() if isinstance(one, float)})
    how = "prepared late" if chosen.late else "prepared after a recorded sampling"
    common.report(f"the first load, {how}, after {chosen.steps} FP16 steps", chosen, found)


def with_profile(load, path: Path):
    """Return what loads under Python's profiler, and waits for the GPU in the end."""

    def profiling():
        made = []
        profiled(lambda: made.append(load()), path)
        return made[0]

    return profiling


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


first() if chosen.first else main()
