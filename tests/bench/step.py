"""One sampling step: GPU kernel time, launches and wall time, against stock ComfyUI's own ways."""

import common

chosen = common.arguments(
    __doc__,
    size={"type": int, "default": 1024},
    steps={"type": int, "default": 8},
    rounds={"type": int, "default": 3},
    only={"nargs": "*", "help": "which variants"},
)

import dataclasses  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from hswq.calibration import DualMonitor, Statistics, monitored_layers  # noqa: E402
from hswq.loader.engine.adopt import ATTACHMENT  # noqa: E402
from hswq.loader.engine.loading import load_checkpoint  # noqa: E402
from hswq.quant import expected_error  # noqa: E402


def stock(**model_options):
    return comfy.sd.load_checkpoint_guess_config(
        chosen.checkpoint, output_clip=False, output_vae=False, model_options=model_options
    )[0]


def stock_comfy_quant(measured):
    """Return stock ComfyUI's quantized model, with FP8 matrix products as is its default."""
    plan = load_checkpoint(chosen.checkpoint, common.planner(measured))[0].get_attachment("hswq")
    common.unload()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comfy_quant.safetensors"
        common.write_quantized(chosen.checkpoint, plan, path, markers=True)
        model = comfy.sd.load_checkpoint_guess_config(str(path))[0]
        common.Sampling(model, chosen.size)(1)
    return model


def with_inputs(measured, patcher):
    """Return statistics with the largest inputs that the model really has, in one step."""
    with DualMonitor(patcher.model.diffusion_model) as monitor:
        common.Sampling(patcher, chosen.size)(1)
    found = monitor.statistics()
    layers = {
        name: dataclasses.replace(layer, input_amax=found[name].input_amax)
        for name, layer in measured.items()
    }
    return Statistics(layers, measured.meta)


def ours(measured, keep_ratio=0.25, *, mode="scaled", **how):
    """Return the loader's model."""
    planner = common.planner(measured, keep_ratio, mode)
    return load_checkpoint(chosen.checkpoint, planner, only_model=True, **how)[0]


def error_of(patcher) -> dict[str, str]:
    """Return the expected error of a quantized model's weights, as the panel has it."""
    plan = patcher.get_attachment(ATTACHMENT)
    if plan is None:
        return {}
    errors = {name: layer.relative_error or 0.0 for name, layer in plan.layers.items()}
    layers = monitored_layers(patcher.model.diffusion_model)
    parts = [(errors[name], layer.weight.numel()) for name, layer in layers.items()]
    return {"error": f"{expected_error(parts):.3%}"}


def main() -> None:
    with torch.inference_mode():
        reference = stock()
        measured = with_inputs(common.made_up_statistics(reference), reference)
        makers = {
            "FP16": lambda: reference,
            "stock FP8 cast": lambda: stock(dtype=torch.float8_e4m3fn),
            "stock comfy_quant": lambda: stock_comfy_quant(measured),
            "HSWQ scaled": lambda: ours(measured),
            "HSWQ compatible": lambda: ours(measured, mode="compatible"),
            "HSWQ int8": lambda: ours(measured, mode="int8"),
            "HSWQ scaled, keep 0": lambda: ours(measured, 0.0),
            "HSWQ int8, keep 0": lambda: ours(measured, 0.0, mode="int8"),
            "HSWQ int8, INT8 matmul, keep 0": lambda: ours(
                measured, 0.0, mode="int8", int8_matmul=True
            ),
            "HSWQ scaled, FP8 matmul": lambda: ours(measured, fp8_matmul=True),
            "HSWQ scaled, FP8 matmul, keep 0": lambda: ours(measured, 0.0, fp8_matmul=True),
        }
        makers = {n: m for n, m in makers.items() if not chosen.only or n in chosen.only}
        runs, results = {}, {}
        for name, make in makers.items():
            patcher = make()
            runs[name] = common.Sampling(patcher, chosen.size)
            runs[name](2)  # warm up
            results[name] = {"GiB": round(patcher.model_size() / 2**30, 3), **error_of(patcher)}
            if chosen.device == "cuda":
                steps = {n: common.gpu_kernels(lambda n=n, r=runs[name]: r(n)) for n in (2, 6)}
                time_ms, launches = ((steps[6][i] - steps[2][i]) / 4 for i in (0, 1))
                results[name] |= {"kernel ms": round(time_ms, 2), "launches": round(launches)}
        walls = {name: [] for name in runs}
        for _ in range(chosen.rounds):
            for name, sample in runs.items():
                sample(1)  # it may have been unloaded for another
                walls[name].append(common.wall(lambda s=sample: s(chosen.steps)) / chosen.steps)
        first = next(iter(walls))
        for name, seconds in walls.items():
            ratios = [ours / stock for ours, stock in zip(seconds, walls[first], strict=True)]
            results[name]["wall ms"] = round(1000 * common.median(seconds), 1)
            results[name][f"wall vs {first}"] = round(common.median(ratios), 3)
    common.report("one step of the sampler", chosen, results)


main()
