"""Host memory of loading a full-size SDXL from a file that is not in the page cache.

Start it with a limit to see whether it is enough, page cache and all:
systemd-run --scope -p MemoryMax=8G -p MemorySwapMax=0 python dev.py bench host
"""

import common

chosen = common.arguments(
    __doc__,
    mode={"default": "scaled", "help": "the number format"},
    step={"action": "store_true", "help": "take a step, too, of 1024 x 1024 pixels"},
    whole={"action": "store_true", "help": "CLIP and VAE too, as from a checkpoint"},
    stock={"action": "store_true", "help": "load it by ComfyUI's own loader in 16 bit"},
)

import json  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from harness.hostmemory import PeakMemory, anonymous  # noqa: E402
from hswq.loader.engine.loading import load_checkpoint  # noqa: E402
from hswq.quant import NUMBER_FORMATS, BySensitivity, Planner, SearchSettings  # noqa: E402

_DETAILS = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [2, 2, 2],
    "channel_mult": (1, 2, 4), "transformer_depth_middle": 10, "num_heads": -1,
    "num_head_channels": 64, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "num_classes": "sequential", "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
"""What ComfyUI's detection finds in SDXL's weights, beside SDXL.unet_config."""

_VAE = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def sizes(*, whole: bool) -> dict[str, torch.Size]:
    """Return the shapes of SDXL's tensors by their names in a checkpoint."""
    config = {**comfy.supported_models.SDXL.unet_config, **_DETAILS, "dtype": torch.float16}
    network = UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    parts = {"model.diffusion_model.": network.state_dict()}
    if whole:
        sdxl = comfy.supported_models.SDXL({})
        encoders = comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16)
        with torch.device("meta"):
            vae = AutoencoderKL(ddconfig=_VAE, embed_dim=4)
        parts[""] = sdxl.process_clip_state_dict_for_saving(dict(encoders.state_dict()))
        parts["first_stage_model."] = vae.state_dict()
    return {
        prefix + name: value.shape for prefix, its in parts.items() for name, value in its.items()
    }


def zeros(path: Path, *, whole: bool) -> str:
    """Write a model of SDXL's size that is all zeros, as a file that takes no space on disk."""
    header, end = {}, 0
    for name, shape in sizes(whole=whole).items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return str(path)


def forget(path: str) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(path: str) -> tuple:
    """Return MODEL, CLIP and VAE; the last two are None unless chosen."""
    if chosen.stock:
        return comfy.sd.load_checkpoint_guess_config(
            path, output_clip=chosen.whole, output_vae=chosen.whole
        )[:3]
    few = SearchSettings(candidates=8, refinements=0)  # a CPU takes long
    planner = Planner(None, BySensitivity(0.0), NUMBER_FORMATS[chosen.mode], settings=few)
    return load_checkpoint(path, planner, only_model=not chosen.whole)


def main() -> None:
    made = common.ROOT / ".dev/bench/zeros_sdxl.safetensors"
    made.parent.mkdir(parents=True, exist_ok=True)
    full_size = os.path.getsize(chosen.checkpoint) > 1 << 30
    path = chosen.checkpoint if full_size else zeros(made, whole=chosen.whole)
    forget(path)
    before = anonymous()
    with torch.inference_mode(), PeakMemory() as host:
        start = time.perf_counter()
        patcher, *others = load(path)
        loaded = time.perf_counter()
        if chosen.step:
            common.Sampling(patcher, 1024)(1)
    row = {
        "load s": round(loaded - start, 1),
        "before GiB": round(before / 2**30, 2),
        "peak GiB": round((before + host.bytes) / 2**30, 2),
        "weights GiB": round(patcher.model_size() / 2**30, 2),
    }
    assert all(part is not None for part in others) == chosen.whole
    name = "ComfyUI, 16 bit" if chosen.stock else f"HSWQ {chosen.mode}"
    common.report("host memory, anonymous", chosen, {name: row})


main()
