"""How long compensated rounding takes on every layer of full-size SDXL, and its peak memory.

Weights and sketches are made up: time does not depend on them. `--every 20` takes a part.
"""

import common

chosen = common.arguments(
    __doc__,
    every={"type": int, "default": 1, "help": "take one layer of so many"},
    size={"type": int, "default": 128, "help": "rows of a sketch"},
)

from collections import Counter  # noqa: E402

import comfy.ops  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from harness.hostmemory import PeakMemory  # noqa: E402
from hswq.calibration import monitored_layers  # noqa: E402
from hswq.quant import kernels, quantize, quantize_compensated  # noqa: E402

SLOWEST = 8


def shapes() -> list[tuple[int, ...]]:
    """Return the shapes of SDXL's weights, of which ComfyUI's own class makes none."""
    model = UNetModel(
        **comfy.supported_models.SDXL.unet_config,
        image_size=32, in_channels=4, out_channels=4, num_res_blocks=[2, 2, 2],
        channel_mult=[1, 2, 4], num_classes="sequential", num_head_channels=64,
        use_spatial_transformer=True, transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        device="meta", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    layers = monitored_layers(model).values()
    return [tuple(layer.weight.shape) for layer in layers][:: chosen.every]


def once(shape: tuple[int, ...], compensated: bool) -> float:
    """Return the seconds that one layer takes; making it up takes none of them."""
    weight = torch.randn(shape, device=chosen.device, dtype=torch.float16) * 0.02
    sketch = torch.randn(chosen.size, shape[1], device=chosen.device)
    if compensated:
        return common.wall(lambda: quantize_compensated(weight, 0.1, sketch, scaled=True))
    return common.wall(lambda: quantize(weight, 0.1, scaled=True))


def measured(layers: list[tuple[int, ...]], compensated: bool) -> tuple[dict, Counter]:
    """Return a row of results, and the seconds of each shape's layers together."""
    seconds = Counter()
    peak = PeakMemory()
    if chosen.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with peak:
        for shape in layers:
            seconds[shape] += once(shape, compensated)
    memory = torch.cuda.max_memory_allocated() if chosen.device == "cuda" else peak.bytes
    row = {
        "layers": len(layers), "columns": sum(shape[1] for shape in layers),
        "weights": sum(map(torch.Size.numel, map(torch.Size, layers))),
        "seconds": round(seconds.total(), 3), "peak MB": round(memory / 1e6),
    }  # fmt: skip
    return row, seconds


def main() -> None:
    layers = shapes()
    with torch.inference_mode():
        for shape in dict.fromkeys(layers) if chosen.device == "cuda" else ():
            once(shape, True)  # compiles the kernel, and sets up the GPU's libraries
        results = {"nearest": measured(layers, False)[0]}
        results["compensated"], seconds = measured(layers, True)
    numbers = Counter(layers)
    for shape, total in seconds.most_common(SLOWEST):
        results["x".join(map(str, shape))] = {
            "layers": numbers[shape], "seconds": round(total, 3),
            "ms each": round(1000 * total / numbers[shape], 2),
        }  # fmt: skip
    results["triton"] = {"layers": str(kernels.usable(torch.device(chosen.device)))}
    common.report("compensated rounding of SDXL's layers", chosen, results)


main()
