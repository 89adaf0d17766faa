"""How long the panel and a sampling take where many models have many statistics files."""

import argparse
import logging
import secrets
import sys
import tempfile
import time
import types
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
from hswq.calibration import LayerStatistics, Statistics, save_statistics  # noqa: E402
from hswq.loader import store  # noqa: E402
from hswq.loader.files.fingerprints import fingerprint, looked_up  # noqa: E402
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
        for session in range(chosen.files):
            meta = {"fingerprint": its, "model": path.name, "recording": secrets.token_hex(8)}
            name = f"m{number}.{its[:16]}.s{session}.pt"
            save_statistics(Statistics(sums, {**sums.meta, **meta}), folder / name)
        found.append(its)
    return found


def timed(what: str, question: Callable) -> object:
    began = time.perf_counter()
    answer = question()
    print(f"{what}: {1000 * (time.perf_counter() - began):.0f} ms", flush=True)
    return answer


def forget() -> None:
    """Know no more than after a restart."""
    for cache in (locked_file._cache, heads._known, heads._files):
        cache.clear()


def show(catalogue: Catalogue, its: str) -> None:
    preview(catalogue.model(its[:16]), QuantizeSettings())


def main() -> None:
    logging.disable(logging.WARNING)
    register_folder()
    models = make(BASE)
    print(f"{chosen.models} models of {chosen.files} files each")
    first = Catalogue(list)
    timed("status, nothing known", first.status)
    timed("status again", first.status)
    forget()
    later = Catalogue(list)
    timed("status after a restart", later.status)
    store.quantizing_statistics(models[0])
    for which in ("first", "next", "next"):
        timed(f"{which} preview", lambda: show(later, models[0]))
    sums = statistics()
    for which in ("first", "next", "next"):
        add = (sums, models[1], "s0", "m1")
        timed(f"{which} sampling added", lambda add=add: store.add_statistics(*add))
    timed("status after a sampling", later.status)


main()
