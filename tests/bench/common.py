"""What the benchmarks share: ComfyUI without its server, models to compare, and measuring.

Import this before anything of comfy. Runs where dev.py runs it, and on any machine with
ComfyUI's packages when COMFYUI_PATH names its tree.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def arguments(
    description: str, *, trained: bool = False, comfyui: Sequence[str] = (), **extra: dict
) -> argparse.Namespace:
    """Parse the options of every benchmark, then bring ComfyUI up with the right ones of its own.

    Args:
        description: of the benchmark.
        trained: by default take the trained toy, whose pictures mean something.
        comfyui: options of ComfyUI's own command line.
        extra: further options by name, each the keyword arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", help="16-bit checkpoint; default: the toy's")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--dynamic", action="store_true", help="turn Dynamic VRAM on")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    chosen = parser.parse_args()
    if start_comfyui(chosen.device, *comfyui, dynamic=chosen.dynamic) != chosen.dynamic:
        sys.exit("Dynamic VRAM does not start here")
    chosen.device = chosen.device or default_device()
    package = types.ModuleType("hswq")
    package.__path__ = [str(ROOT)]
    sys.modules["hswq"] = package
    from hswq.loader.files.whole_hash import background

    background.busy = lambda: True  # as ComfyUI is at work: hashing takes a tenth of a core then
    if chosen.checkpoint is None:
        from toy.checkpoint import make_checkpoint, make_trained_checkpoint

        make, name = (make_trained_checkpoint, "trained") if trained else (make_checkpoint, "toy")
        chosen.checkpoint = str(make(ROOT / f".dev/bench/{name}_sdxl.safetensors"))
    return chosen


def default_device() -> str:
    """Return "cuda" where there is an NVIDIA GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def start_comfyui(device: str | None, *options: str, dynamic: bool = False) -> bool:
    """Bring ComfyUI up in this process, without its server and with the toy known to it.

    As in ComfyUI's main.py, torch allocates the GPU's memory by cudaMallocAsync. That can only be
    chosen before torch is imported. If it was imported before, ComfyUI goes by what torch has.

    Args:
        device: "cuda" or "cpu"; None for cuda if there is an NVIDIA GPU.
        options: further ones of ComfyUI's own command line.
        dynamic: turn Dynamic VRAM on, if the device is a GPU.

    Returns:
        Whether Dynamic VRAM is on.
    """
    sys.path[:0] = [os.environ.get("COMFYUI_PATH", str(ROOT / ".dev/ComfyUI")), str(ROOT / "tests")]
    arguments, sys.argv = sys.argv, [sys.argv[0], *options]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        from comfy.cli_args import args
    finally:
        sys.argv = arguments
    if "torch" not in sys.modules:
        import cuda_malloc  # noqa: F401
    args.cpu = (device or default_device()) == "cpu"
    args.cuda_malloc = _is_by_cuda_malloc_async()
    dynamic = dynamic and not args.cpu and _turn_on_dynamic_vram()
    import comfy.sd
    import toy.nodes  # noqa: F401

    return dynamic


def _is_by_cuda_malloc_async() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "cudaMallocAsync"


def _turn_on_dynamic_vram() -> bool:
    """Do what ComfyUI's main.py does, which has no function for it."""
    import comfy_aimdo.control

    comfy_aimdo.control.init(simple_vram_headroom=None, nvml_pressure=True)
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = comfy.model_management.get_all_torch_devices()
    if not comfy_aimdo.control.init_devices((device.index, 0) for device in devices):
        return False
    comfy_aimdo.control.set_log_warning()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return True


def made_up_statistics(patcher, seed: int = 0):
    """Return plausible statistics for a model's layers: speed does not depend on their values."""
    import torch
    from hswq.calibration import LayerStatistics, Statistics, monitored_layers

    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in monitored_layers(patcher.model.diffusion_model).items():
        importance = torch.rand(layer.weight.shape[1], generator=generator, dtype=torch.float64)
        sensitivity = torch.rand((), generator=generator).item()
        layers[name] = LayerStatistics(0.0, 256 * sensitivity, 256, 256 * importance, 256)
    return Statistics(layers, {"samples": 256})


def planner(measured, keep_ratio: float = 0.25, mode: str = "scaled"):
    """Return a Planner with the default settings, for one of NUMBER_FORMATS."""
    from hswq.quant import NUMBER_FORMATS, BySensitivity, Planner

    return Planner(measured, BySensitivity(keep_ratio), NUMBER_FORMATS[mode])


def write_quantized(checkpoint: str, plan, path: Path, *, markers: bool) -> None:
    """Write a checkpoint with a Plan's layers in FP8, for stock ComfyUI to load.

    Args:
        checkpoint: 16-bit safetensors file.
        plan: says which layers, and their amax.
        path: to write.
        markers: in ComfyUI's own format, which has no Conv2d; else plain FP8 among 16-bit
            layers, as the original's V1.
    """
    import torch
    from hswq.quant import quantize
    from safetensors.torch import load_file, save_file

    marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = load_file(checkpoint)
    for name in plan.quantized:
        key = f"model.diffusion_model.{name}.weight"
        if markers and tensors[key].ndim > 2:
            continue
        amax = plan.layers[name].amax
        data, scale = quantize(tensors[key].to(device), amax, scaled=markers)
        tensors[key] = data.cpu()
        if markers:
            tensors[f"{key}_scale"] = scale.cpu()
            tensors[key.removesuffix("weight") + "comfy_quant"] = marker.clone()
    save_file(tensors, path)


class Sampling:
    """Steps of a stock sampler at cfg 7, so a batch of two goes through the diffusion model."""

    def __init__(self, patcher, size: int) -> None:
        """Take the model and the picture's width and height in pixels."""
        import torch

        context = patcher.model.model_config.unet_config["context_dim"]
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(1, 77, context, generator=generator)
        pooled = {"pooled_output": torch.randn(1, 1280, generator=generator)}
        self.patcher = patcher
        self._positive, self._negative = [[hidden, pooled]], [[-hidden, pooled]]
        self._noise = torch.randn(1, 4, size // 8, size // 8, generator=generator)

    def __call__(self, steps: int):
        """Sample and return the latent."""
        import comfy.sample
        import torch

        with torch.inference_mode():
            return comfy.sample.sample(
                self.patcher, self._noise, steps, 7.0, "euler", "normal",
                self._positive, self._negative, torch.zeros_like(self._noise), disable_pbar=True,
            )  # fmt: skip


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def gpu_kernels(function: Callable[[], object]) -> tuple[float, int]:
    """Return the milliseconds of GPU kernels in a call and their number; copies do not count."""
    from torch.profiler import ProfilerActivity, profile

    synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        function()
        synchronize()
    kernels = [
        event for event in profiler.events()
        if str(event.device_type).endswith("CUDA") and not event.name.startswith("Mem")
    ]  # fmt: skip
    return sum(event.device_time_total for event in kernels) / 1000, len(kernels)


def alternately(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every function in every round, measured in turn."""
    found = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name].append(wall(function))
    return found


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def unload() -> None:
    """Take every model off the GPU and give the memory back."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache(True)


def read_once(path: str) -> None:
    """Bring a file into the page cache, where ComfyUI with Dynamic VRAM removes what it has read.

    What is loaded next would wait for the disk.
    """
    with open(path, "rb", buffering=0) as file:
        while file.read(16 << 20):
            pass


def report(name: str, chosen: argparse.Namespace, results: dict[str, dict]) -> None:
    """Print a table of results, a row each, and write them as JSON where asked."""
    import torch
    from comfyui_version import __version__ as comfyui

    columns = list(dict.fromkeys(key for row in results.values() for key in row))
    first = max(map(len, results))
    print(f"\n{name}")
    print("  ".join([" " * first, *columns]))
    for label, row in results.items():
        cells = (f"{row.get(key, ''):>{len(key)}}" for key in columns)
        print("  ".join([label.ljust(first), *cells]))
    about = {
        "benchmark": name,
        "device": torch.cuda.get_device_name() if chosen.device == "cuda" else platform.processor(),
        "torch": torch.__version__, "comfyui": comfyui, "python": platform.python_version(),
        "dynamic_vram": chosen.dynamic, "checkpoint": os.path.basename(chosen.checkpoint),
        "results": results,
    }  # fmt: skip
    print(json.dumps({key: value for key, value in about.items() if key != "results"}))
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(about, indent=2) + "\n")
