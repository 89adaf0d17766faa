"""Mutated statistics, sketches, headers and caches: how many are read, and what they take.

None may raise anything but its own sentence, take a second, or change a file.
"""

import argparse
import logging
import random
import sys
import tempfile
import time
import tracemalloc
import types
import warnings
from pathlib import Path

import common

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--count", type=int, default=1000, help="mutations of each kind")
parser.add_argument("--only", nargs="+", metavar="KIND", help="of KINDS")
chosen = parser.parse_args()

BASE = tempfile.TemporaryDirectory(prefix="hswq-hostile-")
common.start_comfyui("cpu", "--base-directory", BASE.name)
package = types.ModuleType("hswq")
package.__path__ = [str(common.ROOT)]
sys.modules["hswq"] = package

from harness.mutated_caches import KINDS  # noqa: E402
from hswq.loader.host.folders import register_folder  # noqa: E402


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # pickletools' about escapes in a mutated string
    folder = Path(BASE.name) / "hostile"
    folder.mkdir()
    register_folder()
    for name in chosen.only or KINDS:
        attack = KINDS[name](folder, random.Random(f"{chosen.seed} {name}"))
        refused, slowest, largest = 0, 0.0, 0
        for number in range(chosen.count):
            content = attack.write()
            before = sorted(folder.rglob("*"))
            traced = number % 20 == 0  # tracing makes all slower
            if traced:
                tracemalloc.start()
            began = time.perf_counter()
            refused += attack.is_refused()
            slowest = max(slowest, time.perf_counter() - began)
            if traced:
                peak = tracemalloc.get_traced_memory()[1]
                largest = max(largest, peak - 2 * len(content))
                tracemalloc.stop()
            assert sorted(folder.rglob("*")) == before
            assert attack.path.read_bytes() == content
        print(
            f"{name}: seed {chosen.seed}, {chosen.count} files, {refused} refused, slowest "
            f"{slowest * 1000:.0f} ms, at most {largest / 2**20:.1f} MiB above twice a file's size"
        )


main()
