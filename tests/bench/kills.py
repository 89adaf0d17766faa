"""Processes killed while they write: what they have left, and what the next start removes."""

import argparse
import logging
import sys
import tempfile
import time
import types
from pathlib import Path

import common

KINDS = ("sampling", "export", "compensation", "effects", "caches")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
parser.add_argument("--count", type=int, default=500, help="kills of each kind")
parser.add_argument("--seed", type=int, default=0)
chosen = parser.parse_args()

BASE = tempfile.TemporaryDirectory(prefix="hswq-kills-")
common.start_comfyui("cpu", "--base-directory", BASE.name)
package = types.ModuleType("hswq")
package.__path__ = [str(common.ROOT)]
sys.modules["hswq"] = package

import torch  # noqa: E402
from harness import inprocess, kills  # noqa: E402
from hswq.loader.host.folders import register_folder  # noqa: E402
from toy.checkpoint import make_checkpoint  # noqa: E402

torch.set_num_threads(1)


def victim(kind: str, checkpoint: Path) -> kills.Victim:
    if kind == "sampling":
        return kills.Sampling(checkpoint)
    if kind == "export":
        statistics = common.made_up_statistics(inprocess.load_16_bit(checkpoint))
        return kills.Exporting(checkpoint, statistics)
    if kind == "compensation":
        return kills.Compensation(checkpoint)
    if kind == "effects":
        return kills.Measuring()
    return kills.Caches(Path(BASE.name) / "source")


def main() -> None:
    logging.disable(logging.WARNING)
    register_folder()
    settings = Path(BASE.name) / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"HSWQ.Budget": 100, "HSWQ.Target": 4096}')
    checkpoint = make_checkpoint(Path(BASE.name) / "models" / "checkpoints" / "toy.safetensors")
    for kind in chosen.only:
        began = time.monotonic()
        when = kills.kill(victim(kind, checkpoint), chosen.count, chosen.seed)
        there, left = kills.left_after_a_start()
        assert left == [], left
        print(
            f"{kind}: seed {chosen.seed}, {chosen.count} kills, {when.pieces} pieces of work done; "
            f"{when.before} before a piece's first file was opened, {when.writing} before its "
            f"first was in place, {when.between} before its end, {when.after} after it; "
            f"{there} temporary files, none after the next start, {time.monotonic() - began:.0f} s",
            flush=True,
        )


main()
