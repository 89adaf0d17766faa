"""Reading a safetensors file tensor by tensor: each is mapped when it is asked for.

The safetensors library can do this too, but each tensor that version 0.8.0 reads leaves an integer
or two in memory for good. With all sketches, that was 0.1 MB a sampling.
"""

from __future__ import annotations

import os

import torch

from .safetensors import DTYPES, parse_header


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
        # Tensors that are made in inference mode cannot become parameters without a copy.
        with torch.inference_mode(False):
            try:
                self._bytes = torch.from_file(os.fspath(path), size=size, dtype=torch.uint8)
            except RuntimeError as error:  # it was removed or cut short just now
                raise OSError(str(error).split("\n", 1)[0]) from error

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU, mapped.

        Raises:
            KeyError: the file has none of that name, or torch does not know its dtype.
        """
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        with torch.inference_mode(False):
            content = self._bytes[entry.start : entry.end]
            if entry.start % dtype.itemsize:  # the format does not promise that tensors are aligned
                content = content.clone()
            return content.view(dtype).view(entry.shape)
