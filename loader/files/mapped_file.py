"""Reading a safetensors file tensor by tensor: each is mapped when it is asked for.

The safetensors library can do this too, but each tensor that version 0.8.0 reads leaves an integer
or two in memory for good. With all sketches, that was 0.1 MB a sampling.
"""

from __future__ import annotations

import os

import torch

from .safetensors import DTYPES, TensorEntry, parse_header


class MappedFile:
    """A safetensors file. Its tensors remain valid for as long as somebody holds them.

    Attributes:
        entries: dtype, shape and place of each tensor, by name.
        metadata: the file's `__metadata__`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Check the header, and map the file.

        Raises:
            OSError: it cannot be read, or is not a regular file; FileNotFoundError: it does not
                exist.
            ModelFileError: the header or the file's size is not what safetensors prescribes.
        """
        self.entries, self.metadata = parse_header(os.fspath(path))
        size = max((entry.end for entry in self.entries.values()), default=0)
        self._bytes = mapped(path, size)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU, mapped.

        Raises:
            KeyError: the file has none of that name, or torch does not know its dtype.
        """
        return part_of(self._bytes, self.entries[name])


def mapped(path: str | os.PathLike, size: int) -> torch.Tensor:
    """Return the first `size` bytes of a file, mapped for as long as somebody holds them.

    Raises:
        OSError: it cannot be read, or is shorter.
    """
    # Tensors that are made in inference mode cannot become parameters without a copy.
    with torch.inference_mode(False):
        try:
            return torch.from_file(os.fspath(path), size=size, dtype=torch.uint8)
        except RuntimeError as error:
            raise OSError(str(error).split("\n", 1)[0]) from error


def part_of(content: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """Return the tensor that an entry describes; it shares the memory of the file's bytes.

    Raises:
        KeyError: torch does not know its dtype.
    """
    dtype = DTYPES[entry.dtype]
    with torch.inference_mode(False):
        part = content[entry.start : entry.end]
        if entry.start % dtype.itemsize:  # the format does not promise that tensors are aligned
            part = part.clone()
        return part.view(dtype).view(entry.shape)
