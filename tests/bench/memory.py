"""What the weights take in GPU memory after a step, and whether kept layers are 16 bit there."""

import common

chosen = common.arguments(__doc__, size={"type": int, "default": 1024})

import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from hswq.calibration import monitored_layers  # noqa: E402
from hswq.loader.engine.adopt import ATTACHMENT  # noqa: E402
from hswq.loader.engine.loading import load_checkpoint  # noqa: E402
from hswq.quant import NUMBER_FORMATS  # noqa: E402


def where_it_computes(layer: torch.nn.Module) -> torch.Tensor:
    """Return the weight that a layer computes with; Dynamic VRAM has its own copy."""
    return getattr(layer, "_v_weight", layer.weight)


def measure(patcher, kept: list[str]) -> dict:
    """Take a step and look at what is in memory then."""
    common.Sampling(patcher, chosen.size)(1)
    layers = monitored_layers(patcher.model.diffusion_model)
    weights = {name: where_it_computes(layer) for name, layer in layers.items()}
    sixteen = [
        name for name in kept
        if weights[name].dtype.itemsize >= 2 and not hasattr(weights[name], "_qdata")
    ]  # fmt: skip
    row = {
        "weights GiB": round(patcher.model_size() / 2**30, 3),
        "kept layers": len(kept),
        "16 bit in memory": len(sixteen),
    }
    if chosen.device == "cuda":
        row["on the GPU GiB"] = round(patcher.loaded_size() / 2**30, 3)
        row["torch GiB"] = round(torch.cuda.memory_allocated() / 2**30, 3)
    return row


def main() -> None:
    path = chosen.checkpoint
    with torch.inference_mode():
        reference = comfy.sd.load_checkpoint_guess_config(path)[0]
        measured = common.made_up_statistics(reference)
        every = list(measured)
        results = {"FP16": measure(reference, every)}
        del reference
        for mode in NUMBER_FORMATS:
            common.unload()
            patcher = load_checkpoint(path, common.planner(measured, mode=mode))[0]
            plan = patcher.get_attachment(ATTACHMENT)
            results[f"HSWQ {mode}"] = measure(patcher, plan.kept)
            del patcher
            if mode != "compatible":
                continue
            with tempfile.TemporaryDirectory() as folder:
                mixed = Path(folder) / "mixed.safetensors"
                common.write_quantized(path, plan, mixed, markers=False)
                common.unload()
                stock = comfy.sd.load_checkpoint_guess_config(str(mixed))[0]
                results["stock loader, V1 file"] = measure(stock, plan.kept)
                del stock
                common.unload()
                ours = load_checkpoint(str(mixed), None)[0]
                results["HSWQ loader, V1 file"] = measure(ours, plan.kept)
                del ours
    common.report("weights in memory after a step", chosen, results)


main()
