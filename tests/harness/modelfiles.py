"""Small model files whose age and content a test decides; tests of what is known of files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from hswq.loader.files import fingerprints
from hswq.loader.files.versions import version_of
from hswq.loader.files.whole_hash import background
from safetensors.torch import save_file

HOUR = 3600


def model_file(path: Path, seed: int = 0) -> str:
    """Write a file with 2 KB of weights that was last changed an hour ago; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {f"{n}.weight": torch.randn(16, 16, generator=generator).half() for n in range(4)}
    save_file(weights, path)
    an_hour_older(path)
    return str(path)


def an_hour_older(path: str | os.PathLike) -> None:
    """Change a file's time."""
    status = os.stat(path)
    os.utime(path, (status.st_atime - HOUR, status.st_mtime - HOUR))


def rewritten(path: str, content: bytes) -> None:
    """Change a file's content, and make what is known of it, of the new version.

    So it goes on being told by whom does not look at the content.
    """
    before = os.stat(path)
    Path(path).write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    real, file = os.path.realpath(path), fingerprints._file()
    known = fingerprints._all(file)
    if real in known and known[real].size == len(content):
        known[real] = fingerprints._Known(*version_of(path), known[real].fingerprint)
        if file is not None and file.is_file():
            fingerprints._keep(file)


def restart() -> None:
    """Forget what is in memory, as a start of ComfyUI does."""
    fingerprints._all.cache_clear()


def end_hashing() -> None:
    """Hash no file any more that an earlier test has used: what is found would go to this one.

    To wait for it takes two seconds, as that is how long a new file is left alone.
    """
    busy = background.busy
    background.stop()
    background.join()
    background.__init__()
    background.busy = busy
