"""One sampling step while statistics are recorded: passively, of every layer, and naively.

Naive hooks measure with torch's operations and bring every result to the host at once. Times are of
whole samplings, with the transfer of the sums at their end; files are written apart.
"""

import contextlib
import math

import common

chosen = common.arguments(
    __doc__,
    size={"type": int, "default": 1024},
    steps={"type": int, "default": 20},
    rounds={"type": int, "default": 5},
    budget={"type": float, "default": 2.0, "help": "percent, of passive recording"},
    only={"nargs": "*", "help": "which variants"},
)

import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from hswq.calibration import (  # noqa: E402
    DualMonitor,
    Rotation,
    merge_sketches,
    monitored_layers,
    save_statistics,
)
from hswq.loader.recording.recorder import share_of  # noqa: E402
from hswq.loader.store import sketch_file  # noqa: E402
from hswq.loader.store.sketch_sets import Recorded, Total  # noqa: E402
from hswq.loader.store.sketches import BYTES_A_SAMPLING  # noqa: E402

PASSIVE, WITHOUT = "passive", "passive, without sketches"


@contextlib.contextmanager
def naive(network: torch.nn.Module):
    """Hook every layer as it is easiest to write."""
    sums = {}

    def measure(name):
        def hook(_, args, output):
            wide = output.float()
            mean, square = wide.mean().item(), (wide * wide).mean().item()
            axes = {4: (0, 2, 3), 3: (0, 1), 2: (0,)}[args[0].ndim]
            importance = args[0].float().abs().mean(axes).cpu()
            before = sums.get(name, (0, 0, 0))
            sums[name] = (before[0] + mean, before[1] + square, before[2] + importance)

        return hook

    layers = monitored_layers(network)
    handles = [layer.register_forward_hook(measure(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def measured(network: torch.nn.Module, rotation: Rotation | None = None, **how: float):
    with DualMonitor(network, rotation=rotation, **how) as monitor:
        yield
    monitor.statistics()
    monitor.sketches()


def kernels(sample, recording, steps: int) -> dict:
    """Return a step's kernel time and launches, averaged over `steps` of them."""

    def run(count: int) -> None:
        with recording():
            sample(count)

    few, many = (common.gpu_kernels(lambda n=n: run(n)) for n in (2, 2 + steps))
    time_ms, launches = ((many[i] - few[i]) / steps for i in (0, 1))
    return {"kernel ms": round(time_ms, 2), "launches": round(launches, 1)}


def walls(sample, recordings: dict) -> dict[str, list[float]]:
    def run(recording) -> None:
        with recording():
            sample(chosen.steps)

    functions = {name: lambda r=recording: run(r) for name, recording in recordings.items()}
    return common.alternately(functions, chosen.rounds)


def savings(network: torch.nn.Module, sample) -> dict[str, dict]:
    """Return what keeping a sampling costs, and writing sketches every some samplings."""
    with DualMonitor(network) as monitor:
        sample(1)
    statistics, sketches = monitor.statistics(), monitor.sketches()
    half = merge_sketches(sketches, sketches)
    ids = frozenset({"0" * 16})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.pt"
        seconds = {
            "the sums": common.wall(lambda: save_statistics(statistics, path)),
            "sketches read back": common.wall(monitor.sketches),
            "sketches added in memory": common.wall(lambda: merge_sketches(half, sketches)),
        }
        origin = sketch_file.Origin(None, "saved", ids)
        sketch_file.write(path, Recorded(half), origin)
        before = sketch_file.SketchFile(sketch_file.beside(path), statistics, ids)
        total = Total([before, Recorded(sketches)])
        seconds["sketches written"] = common.wall(lambda: sketch_file.write(path, total, origin))
        size = sketch_file.beside(path).stat().st_size
    rows = {name: {"ms": round(1000 * found)} for name, found in seconds.items()}
    rows["sketches written"]["MB"] = round(size / 1e6, 1)
    rows["sketches written"]["every samplings"] = math.ceil(size / BYTES_A_SAMPLING)
    return rows


def main() -> None:
    patcher = comfy.sd.load_checkpoint_guess_config(
        chosen.checkpoint, output_clip=False, output_vae=False
    )[0]
    network, sample = patcher.model.diffusion_model, common.Sampling(patcher, chosen.size)
    share = share_of(chosen.budget, patcher.load_device)
    rotation = Rotation(list(monitored_layers(network)), share)
    recordings = {
        "not recording": contextlib.nullcontext,
        PASSIVE: lambda: measured(network, rotation),
        WITHOUT: lambda: measured(network, rotation, sketched=0),
        "every layer": lambda: measured(network),
        "every layer, without sketches": lambda: measured(network, sketched=0),
        "naive hooks": lambda: naive(network),
    }
    recordings = {n: r for n, r in recordings.items() if not chosen.only or n in chosen.only}
    results = {name: {} for name in recordings}
    for name, recording in recordings.items():
        with recording():  # warm up
            sample(2)
        if chosen.device == "cuda":
            results[name] = kernels(
                sample, recording, len(rotation) if name in (PASSIVE, WITHOUT) else 4
            )
    seconds = walls(sample, recordings)
    first = next(iter(seconds))
    for name, found in seconds.items():
        ratios = [ours / stock for ours, stock in zip(found, seconds[first], strict=True)]
        results[name]["wall ms a step"] = round(1000 * common.median(found) / chosen.steps, 2)
        results[name][f"wall vs {first}"] = round(common.median(ratios), 3)
    results |= savings(network, sample)
    common.report(f"a step while recording; passive: {share:.2g} of the layers", chosen, results)


with torch.inference_mode():
    main()
