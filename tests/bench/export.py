"""Exporting a checkpoint against copying its file, and the host memory that it takes."""

import common

chosen = common.arguments(__doc__, rounds={"type": int, "default": 3})

import os  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from harness.hostmemory import PeakMemory  # noqa: E402
from hswq.loader import store  # noqa: E402
from hswq.loader.files.fingerprints import fingerprint  # noqa: E402
from hswq.loader.files.layer_formats import FILE_FORMATS  # noqa: E402
from hswq.loader.host.folders import register_folder  # noqa: E402
from hswq.loader.jobs import choice  # noqa: E402
from hswq.loader.jobs.export import export  # noqa: E402
from hswq.loader.jobs.export_settings import ExportSettings  # noqa: E402


def record(path: str) -> None:
    """Make statistics up, as if sampled."""
    stock = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
    measured = common.made_up_statistics(stock)
    store.add_statistics(
        store.NewSums(measured, fingerprint(path), store.PASSIVE_SESSION, "benchmark")
    )


def copy(path: str, target: Path) -> None:
    """Copy a file and wait for the disk, as the export does."""
    shutil.copyfile(path, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())


def measure(name: str, function, target: Path) -> dict:
    """Call it once; return seconds, the file's size and the memory."""
    with PeakMemory() as memory:
        seconds = common.wall(function)
    size = target.stat().st_size / 2**30
    target.unlink()
    print(f"{name}: {seconds:.2f} s", flush=True)
    return {"s": seconds, "file GiB": size, "host peak GiB": memory.bytes / 2**30}


def rounds_of(path: str, folder: Path) -> dict[str, list[dict]]:
    """Copy and export in turn; a format's first export searches, where its mode is new."""
    found: dict[str, list[dict]] = {}
    target = folder / "exported.safetensors"
    for number in range(chosen.rounds + 1):
        if number:
            row = measure("copy", lambda: copy(path, target), target)
            found.setdefault("copy of the file", []).append(row)
        for kind in FILE_FORMATS:
            settings = ExportSettings(kind, choice.AUTO, 0.25, choice.FAIL)
            row = measure(kind, lambda wanted=settings: export(path, target, wanted), target)
            if number:
                found.setdefault(f"{kind}, plan cached", []).append(row)
            elif kind in ("compatible", "scaled"):
                found.setdefault(f"{kind}, searching", []).append(row)
    return found


def main() -> None:
    path = chosen.checkpoint
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        folder_paths.models_dir = folder
        register_folder()
        record(path)
        found = rounds_of(path, Path(folder))
    results = {
        name: {key: round(common.median([row[key] for row in rows]), 3) for key in rows[0]}
        for name, rows in found.items()
    }
    common.report("exporting a checkpoint", chosen, results)


main()
