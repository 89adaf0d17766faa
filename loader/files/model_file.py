"""Model files: each is opened once, and knows what it holds and which weights those are."""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import comfy.utils
import torch
from comfy.model_detection import unet_prefix_from_state_dict

from .errors import ModelFileError
from .safetensors import (
    DTYPE_NAMES,
    DTYPES,
    NARROW,
    Header,
    TensorEntry,
    is_safetensors,
    parse_header,
)
from .versions import version_of

SAMPLE_BYTES = 256
"""Bytes of every tensor that go into a fingerprint."""


class ModelFile:
    """A checkpoint or a diffusion model, handed on in place of its path.

    Header, prefix, dtypes, fingerprint and tensors are each read once, when first asked for. Its
    tensors map the file, and are released with this object: keep it only as long as needed.

    Attributes:
        path: of the file.
        name: of the file, for messages.
        version: changes with the file (see versions).
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Note the file's version; nothing is read yet.

        Raises:
            OSError: the file is gone.
        """
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path)
        self.version = version_of(Path(self.path))

    @functools.cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Dtype, shape and place of every tensor in the file. For a `.ckpt`, places are not known.

        Raises:
            OSError: the file cannot be read.
            ModelFileError: it is damaged or not a model file.
        """
        if is_safetensors(self.path):
            return self._header.entries
        return {name: _entry_of(tensor) for name, tensor in self._loaded[0].items()}

    @functools.cached_property
    def _header(self) -> Header:
        return parse_header(self.path)

    @functools.cached_property
    def prefix(self) -> str:
        """Prefix of the diffusion model's names; "" if the file holds nothing else."""
        return diffusion_model_prefix(self.entries)

    @functools.cached_property
    def own(self) -> dict[str, TensorEntry]:
        """The diffusion model's entries, named relative to it, in the file's order."""
        prefix, entries = self.prefix, self.entries
        return {
            name.removeprefix(prefix): entries[name] for name in entries if name.startswith(prefix)
        }

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file on the CPU, in a new dict. Those of safetensors are mapped.

        Raises:
            OSError: the file cannot be read.
            ModelFileError: it is damaged or not a model file.
        """
        if is_safetensors(self.path):
            self.entries  # noqa: B018 - checks the header before ComfyUI reads the file
        return dict(self._loaded[0])

    @property
    def hollow(self) -> dict[str, torch.Tensor]:
        """All tensors of the file without their values, on torch's "meta" device.

        Raises:
            OSError, ModelFileError: as `tensors`.
        """
        if any(entry.dtype not in DTYPES for entry in self.entries.values()):
            return self.tensors  # torch itself says what it lacks
        return {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for name, entry in self.entries.items()
        }

    @property
    def metadata(self) -> dict | None:
        """The file's `__metadata__`."""
        return (self._header.metadata or None) if is_safetensors(self.path) else self._loaded[1]

    @functools.cached_property
    def _loaded(self) -> tuple[dict[str, torch.Tensor], dict | None]:
        try:
            # Tensors that are read in inference mode cannot become parameters without a copy.
            with torch.inference_mode(False):
                tensors, metadata = comfy.utils.load_torch_file(self.path, return_metadata=True)
            return {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}, metadata
        except MemoryError:
            raise
        except Exception as error:  # damaged files raise errors of every kind
            if (
                isinstance(error, OSError) and error.errno != errno.EINVAL
            ):  # of an archive cut short
                raise
            # Only in the log, because torch's message advises to run the file's code.
            logging.info("HSWQ: %s cannot be read: %s", self.name, error)
            reason = "it is damaged, or holds more than tensors; the log says more"
            raise ModelFileError(f"{self.name} cannot be read: {reason}") from error

    @functools.cached_property
    def is_quantized(self) -> bool:
        """Whether any weight of the diffusion model is stored in fewer than 16 bits.

        Raises:
            ModelFileError: the file is damaged, or has such weights that are neither FP8 nor INT8.
        """
        narrow = {
            name: entry.dtype
            for name, entry in self.own.items()
            # Also "qweight", the name of packed weights.
            if name.endswith("weight") and entry.dtype in NARROW
        }
        for weight, dtype in narrow.items():
            if dtype not in ("F8_E4M3", "I8") or not weight.endswith(".weight"):
                raise ModelFileError(
                    f"{self.name} is quantized already, its {weight} to {dtype}: "
                    "HSWQ reads 16-bit weights, and quantized ones only in FP8 e4m3 and INT8"
                )
        return bool(narrow)

    def check_16_bit(self) -> None:
        """Refuse a file that is quantized.

        Raises:
            ModelFileError: it is quantized or damaged.
        """
        if self.is_quantized:
            raise ModelFileError(f"{self.name} is quantized already: HSWQ needs 16-bit weights")

    def read_fingerprint(self) -> str:
        """Return a hash that identifies the diffusion model's weights, whatever the file's name.

        It is a SHA-256 (hex) over names, shapes, dtypes and a sample of every tensor's bytes. It is
        equal for a renamed or moved file, and for a checkpoint and a file with only its diffusion
        model. `fingerprints` caches it.

        Raises:
            OSError: the file cannot be read.
            ModelFileError: the file is damaged, or holds no tensors.
        """
        if not self.own:
            raise ModelFileError(f"{self.name} holds no tensors")
        samples = self._samples() if is_safetensors(self.path) else self._samples_of_tensors()
        digest = hashlib.sha256()
        for name in sorted(self.own):
            entry = self.own[name]
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
            digest.update(samples[name])
        return digest.hexdigest()

    def _samples(self) -> dict[str, bytes]:
        """Return some bytes from the middle of every tensor of a safetensors file."""
        found = {}
        with open(self.path, "rb") as file:
            for name, entry in self.own.items():
                length = min(SAMPLE_BYTES, entry.end - entry.start)
                file.seek(entry.start + (entry.end - entry.start - length) // 2)
                found[name] = file.read(length)
        return found

    def _samples_of_tensors(self) -> dict[str, bytes]:
        """Return the same bytes for a `.ckpt`, so that both kinds of file have one fingerprint."""
        found = {}
        for name in self.own:
            data = self._loaded[0][self.prefix + name].contiguous().view(-1).view(torch.uint8)
            length = min(SAMPLE_BYTES, data.numel())
            start = (data.numel() - length) // 2
            found[name] = data[start : start + length].numpy().tobytes()
        return found


def opened(file: ModelFile | str) -> ModelFile:
    """Return a ModelFile as it is; open a path."""
    return file if isinstance(file, ModelFile) else ModelFile(file)


def diffusion_model_prefix(names: Collection[str]) -> str:
    """Return the prefix of the diffusion model's names; "" if there is nothing else."""
    prefix = unet_prefix_from_state_dict(names)
    return prefix if any(name.startswith(prefix) for name in names) else ""


def _entry_of(tensor: torch.Tensor) -> TensorEntry:
    dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
    return TensorEntry(dtype, tuple(tensor.shape), 0, tensor.nbytes)
