"""How long the search of all layers takes, weights on the GPU, and its agreement with torch's."""

import common

chosen = common.arguments(__doc__, rounds={"type": int, "default": 3})

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from hswq.calibration import monitored_layers  # noqa: E402
from hswq.quant import NUMBER_FORMATS, SearchSettings, kernels  # noqa: E402


def run(weights: dict, measured, keep_ratio: float, mode: str) -> None:
    planner = common.planner(measured, keep_ratio, mode)
    for name, weight in weights.items():
        planner.clipping_of(name, weight)
    planner.finish()


def disagreement(weights: dict, measured, mode: str) -> float:
    """Return the largest relative difference of amax between the kernels and plain torch."""
    worst = 0.0
    for name in list(weights)[:: max(1, len(weights) // 40)]:
        found = []
        for weight in (weights[name], weights[name].cpu()):
            searched = NUMBER_FORMATS[mode].search(
                weight, measured[name].importance, SearchSettings()
            )
            found.append(searched.clipping.amax.item())
        worst = max(worst, abs(found[0] / found[1] - 1))
    return worst


def main() -> None:
    with torch.inference_mode():
        patcher = comfy.sd.load_checkpoint_guess_config(chosen.checkpoint)[0]
        measured = common.made_up_statistics(patcher)
        layers = monitored_layers(patcher.model.diffusion_model)
        weights = {
            name: layer.weight.detach().to(chosen.device, torch.float16)
            for name, layer in layers.items()
        }
        results = {}
        for mode in NUMBER_FORMATS:
            run(weights, measured, 0.0, mode)  # compiles the kernels
            seconds = [
                common.wall(lambda mode=mode: run(weights, measured, 0.0, mode))
                for _ in range(chosen.rounds)
            ]
            row = {"layers": len(weights), "seconds": round(common.median(seconds), 4)}
            if chosen.device == "cuda":
                time_ms, launches = common.gpu_kernels(
                    lambda mode=mode: run(weights, measured, 0.0, mode)
                )
                row |= {"kernel ms": round(time_ms, 1), "launches": launches}
                row["amax vs torch"] = f"{disagreement(weights, measured, mode):.1e}"
            results[mode] = row
    results["triton"] = {"layers": str(kernels.usable(torch.device(chosen.device)))}
    common.report("search of every layer's amax", chosen, results)


main()
