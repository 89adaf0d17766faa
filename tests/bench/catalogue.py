"""How long the panel and a sampling take where many models have many statistics files."""

import argparse
import io
import logging
import struct
import sys
import tempfile
import time
import types
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import common

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--models", type=int, default=100)
parser.add_argument("--files", type=int, default=20, help="sessions of each model")
parser.add_argument("--base", metavar="FOLDER", help="keep the files there, for the next time")
parser.add_argument("--layers", type=int, default=794, help="of each model, as SDXL has")
chosen = parser.parse_args()

TEMPORARY = tempfile.TemporaryDirectory(prefix="hswq-catalogue-")
BASE = Path(chosen.base or TEMPORARY.name)
common.start_comfyui("cpu", "--base-directory", str(BASE))
package = types.ModuleType("hswq")
package.__path__ = [str(common.ROOT)]
sys.modules["hswq"] = package

import torch  # noqa: E402
from hswq.calibration import LayerStatistics, Statistics, load_statistics, save_statistics  # noqa: E402
from hswq.loader import store  # noqa: E402
from hswq.loader.files.fingerprints import fingerprint, looked_up  # noqa: E402
from hswq.loader.files.versions import version_of  # noqa: E402
from hswq.loader.host.folders import register_folder, statistics_folder  # noqa: E402
from hswq.loader.panel.catalogue import Catalogue  # noqa: E402
from hswq.loader.panel.preview import preview  # noqa: E402
from hswq.loader.store import heads, locked_file  # noqa: E402
from hswq.quant import QuantizeSettings  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def statistics() -> Statistics:
    """Of layers with eight channels: sizes of files are not what is measured."""
    one = LayerStatistics(1.0, 2.0, 16, torch.ones(8, dtype=torch.float64), 16, 3.0)
    names = [f"input_blocks.{n}.1.transformer_blocks.0.attn1.to_q" for n in range(chosen.layers)]
    return Statistics(dict.fromkeys(names, one), {"samples": 16, "layers": chosen.layers})


def make(base: Path) -> list[str]:
    """Write all files, and return the models' fingerprints."""
    folder, sums, found = statistics_folder(), statistics(), []
    (base / "models" / "checkpoints").mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(chosen.models):
        path = base / "models" / "checkpoints" / f"m{number}.safetensors"
        if path.exists():
            found.append(fingerprint(str(path)))
            continue
        save_file({"model.diffusion_model.a.weight": torch.full((8, 8), float(number))}, path)
        its = looked_up(str(path))
        meta = {"fingerprint": its, "model": path.name, "recording": "f" * 16}
        one = folder / f"m{number}.{its[:16]}.s0.pt"
        save_statistics(Statistics(sums, {**sums.meta, **meta}), one)
        content = one.read_bytes()
        for session in range(chosen.files):
            path = one.with_name(f"m{number}.{its[:16]}.s{session}.pt")
            path.write_bytes(another(content, f"{session:016x}"))
        found.append(its)
    return found


def another(content: bytes, recording: str) -> bytes:
    """Return the same file with another recording's id: written anew, each would take long."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        before = archive.read(name)
    after = before.replace(b"f" * 16, recording.encode())
    sums = [struct.pack("<I", zlib.crc32(data)) for data in (before, after)]
    return content.replace(before, after).replace(*sums)


def keep_heads(models: list[str]) -> None:
    """Keep what the files hold as recording them would have: reading them would take minutes."""
    sums = statistics()
    for number, its in enumerate(models):
        for path in statistics_folder().glob(f"*.{its[:16]}.*.pt"):
            recording = f"{int(path.stem.rpartition('.s')[2]):016x}"
            meta = {"fingerprint": its, "model": f"m{number}.safetensors", "recording": recording}
            bare = {name: heads._bare(layer) for name, layer in sums.items()}
            known = Statistics(bare, {**sums.meta, **meta})
            heads._files[path] = version_of(path), known
        heads.heads_of(its[:16], keep=True)


def timed(what: str, question: Callable) -> object:
    began, worked = time.perf_counter(), time.process_time()
    answer = question()
    took = 1000 * (time.perf_counter() - began), 1000 * (time.process_time() - worked)
    print(f"{what}: {took[0]:.0f} ms, of which {took[1]:.0f} ms on the CPU", flush=True)
    return answer


opened: list[Path] = []


def forget() -> None:
    """Know no more than after a restart; count the statistics files that are read from then on."""
    for cache in (locked_file._cache, heads._known, heads._files, heads._on_disk, opened):
        cache.clear()


def counted(path: Path) -> Statistics:
    opened.append(path)
    return load_statistics(path)


def show(catalogue: Catalogue, its: str) -> None:
    preview(catalogue.model(its[:16]), QuantizeSettings(compensated=True))


def main() -> None:
    logging.disable(logging.WARNING)
    register_folder()
    heads.load_statistics = locked_file.load_statistics = counted
    models = make(BASE)
    print(f"{chosen.models} models of {chosen.files} files each")
    first = Catalogue(list)
    status = timed("status, nothing known", first.status)
    print(f"{len(status['models'])} models by then, {status['reading']} to be read")
    keep_heads(models)
    forget()
    later = Catalogue(list)
    status = timed("status after a restart", later.status)
    print(f"{len(status['models'])} models by then, {status['reading']} to be read")
    timed("status again", later.status)
    store.quantizing_statistics(models[0])
    for which in ("first", "next", "next"):
        timed(f"{which} preview", lambda: show(later, models[0]))
    store.quantizing_statistics(models[1])
    store.add_statistics(store.NewSums(statistics(), models[1], "s0", "m1"))
    forget()
    for which in ("first", "next", "next"):
        add = store.NewSums(statistics(), models[1], "s0", "m1")
        timed(f"{which} sampling added", lambda add=add: store.add_statistics(add))
    print(f"{len(opened)} statistics files read for them")
    timed("status after a sampling", later.status)


main()
