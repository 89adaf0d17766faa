"""Model files: safe reading, and computing the fingerprint that tells which weights they hold."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Collection
from pathlib import Path

import comfy.utils
import torch
from comfy.model_detection import unet_prefix_from_state_dict

from .errors import ModelFileError
from .safetensors import DTYPE_NAMES, NARROW, TensorEntry, is_safetensors, read_header
from .versions import version_of

SAMPLE_BYTES = 256


def read_fingerprint(path: str) -> str:
    """Return what identifies the diffusion model's weights in a file, whatever its name.

    A SHA-256 (hex) over names, shapes, dtypes and a sample of every tensor's bytes. Equal for a
    renamed or moved file, and for a checkpoint and its diffusion model alone.

    Raises:
        ModelFileError: the file is damaged, or holds no tensors.
    """
    if not is_safetensors(path):
        return _fingerprint_of_tensors(path)
    entries = read_header(path)
    with open(path, "rb") as file:

        def sample(entry: TensorEntry) -> bytes:
            length = min(SAMPLE_BYTES, entry.end - entry.start)
            file.seek(entry.start + (entry.end - entry.start - length) // 2)
            return file.read(length)

        return _digest(
            path,
            {name: (e.dtype, e.shape, sample(e)) for name, e in _diffusion_model(entries).items()},
        )


def is_stored_quantized(path: str) -> bool:
    """Whether any weight of the file's diffusion model is stored in less than 16 bit.

    Raises:
        ModelFileError: the file is damaged, or has weights in less than 16 bit that are not FP8.
    """
    narrow = _narrow_weights(path)
    for weight, dtype in narrow.items():
        if dtype != "F8_E4M3":
            raise ModelFileError(
                f"{os.path.basename(path)} is quantized already, its {weight} to {dtype}: "
                "HSWQ reads 16-bit weights, and of quantized ones those in FP8 e4m3"
            )
    return bool(narrow)


def _narrow_weights(path: str) -> dict[str, str]:
    """Return the dtypes, as safetensors calls them, of weights that have less than 16 bit."""
    if is_safetensors(path):
        entries = _diffusion_model(read_header(path))
        dtypes = {name: entry.dtype for name, entry in entries.items()}
    else:
        dtypes = _dtypes_in_ckpt(path, version_of(Path(path)))
    return {
        name: dtype
        for name, dtype in dtypes.items()
        # Packed ones are called qweight.
        if name.endswith("weight") and dtype in NARROW
    }


@functools.lru_cache(maxsize=16)
def _dtypes_in_ckpt(path: str, _: tuple) -> dict[str, str | None]:
    """Read each version once: all of it comes into memory, where its loader has it already."""
    tensors = _diffusion_model(load_tensors(path)[0])
    return {name: DTYPE_NAMES.get(tensor.dtype) for name, tensor in tensors.items()}


def check_16_bit(path: str) -> None:
    """Refuse a file that is quantized.

    Raises:
        ModelFileError: it is, or it is damaged.
    """
    if is_stored_quantized(path):
        name = os.path.basename(path)
        raise ModelFileError(f"{name} is quantized already: HSWQ needs 16-bit weights")


def _fingerprint_of_tensors(path: str) -> str:
    """Fingerprint a `.ckpt`, read by ComfyUI's safe loader, as if it were safetensors."""

    def facts(tensor: torch.Tensor) -> tuple:
        data = tensor.contiguous().view(-1).view(torch.uint8)
        length = min(SAMPLE_BYTES, data.numel())
        start = (data.numel() - length) // 2
        sample = data[start : start + length].numpy().tobytes()
        return DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), sample

    tensors = _diffusion_model(load_tensors(path)[0])
    return _digest(path, {name: facts(tensor) for name, tensor in tensors.items()})


def diffusion_model_prefix(names: Collection[str]) -> str:
    """Return what the diffusion model's names begin with, "" where the file holds it alone."""
    prefix = unet_prefix_from_state_dict(names)
    return prefix if any(name.startswith(prefix) for name in names) else ""


def _diffusion_model(entries: dict) -> dict:
    """Keep the diffusion model's entries, named relative to it, in the file's order."""
    prefix = diffusion_model_prefix(entries)
    return {name.removeprefix(prefix): e for name, e in entries.items() if name.startswith(prefix)}


def _digest(path: str, tensors: dict[str, tuple]) -> str:
    if not tensors:
        raise ModelFileError(f"{os.path.basename(path)} holds no tensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, sample = tensors[name]
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
        digest.update(sample)
    return digest.hexdigest()


def load_tensors(path: str) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Read a model file through ComfyUI's safe loader; safetensors stay mapped, not copied.

    Read in inference mode they could not become parameters outside of it without a copy.

    Returns:
        The state dict on the CPU and the file's metadata.

    Raises:
        ModelFileError: the file is damaged or is no model file.
    """
    if is_safetensors(path):
        read_header(path)
    try:
        with torch.inference_mode(False):
            tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        return {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}, metadata
    except OSError:
        raise
    except Exception as error:  # the unpickler raises of every kind on damaged files
        reason = str(error).split("\n", 1)[0]
        raise ModelFileError(f"{os.path.basename(path)} cannot be read: {reason}") from error
