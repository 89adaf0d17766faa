"""Writes the toy checkpoint.

python checkpoint.py OUT.safetensors [--seed N | --trained] [--dtype float16|bfloat16|float32]
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from toy.vae import vae_tensors
from toy.weights import clip_tensors, unet_tensors

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
UNET_PREFIX = "model.diffusion_model."
TRAINED = Path(__file__).with_name("trained.safetensors")
"""The UNet that train.py has trained, in FP16."""


def checkpoint_tensors(seed: int = 0, unet: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """UNet, text encoders and VAE in FP32, names as in the original SDXL checkpoint."""
    unet = unet_tensors(seed) if unet is None else unet
    tensors = {UNET_PREFIX + name: value for name, value in unet.items()}
    tensors |= clip_tensors(seed)
    tensors |= {f"first_stage_model.{name}": value for name, value in vae_tensors().items()}
    return tensors


def _save(tensors: dict[str, Tensor], path: str | os.PathLike, dtype: torch.dtype) -> Path:
    """Atomic: a reader finds the whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous()
        for name, value in tensors.items()
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def make_checkpoint(
    path: str | os.PathLike, seed: int = 0, dtype: torch.dtype = torch.float16
) -> Path:
    """Writes the whole toy checkpoint, the same for the same seed, and returns its path."""
    return _save(checkpoint_tensors(seed), path, dtype)


def make_diffusion_model(
    path: str | os.PathLike, seed: int = 0, dtype: torch.dtype = torch.float16, prefix: str = ""
) -> Path:
    """Writes that checkpoint's UNet alone, for the "Load Diffusion Model" nodes."""
    return _save({prefix + name: value for name, value in unet_tensors(seed).items()}, path, dtype)


def make_trained_checkpoint(path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> Path:
    """Writes the whole toy checkpoint with the trained UNet, which draws what prompts say."""
    return _save(checkpoint_tensors(0, load_file(TRAINED)), path, dtype)


def make_trained_diffusion_model(path: str | os.PathLike) -> Path:
    """Writes the trained UNet alone, in FP16, for the "Load Diffusion Model" nodes."""
    return _save(load_file(TRAINED), path, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the toy SDXL checkpoint.")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trained", action="store_true", help="with the trained UNet")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    if args.trained:
        path = make_trained_checkpoint(args.out, dtype)
    else:
        path = make_checkpoint(args.out, args.seed, dtype)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
