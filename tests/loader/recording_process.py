"""A process that uses a statistics folder, for tests that run two or kill one.

recording_process.py add FOLDER COUNT    adds COUNT samples
recording_process.py kill FOLDER COUNT   kills COUNT children that add samples, and checks
recording_process.py end FOLDER HOW      adds to a file that is locked, and ends; HOW says whether
                                         the lock is "free" by then, or still "locked"
recording_process.py known FOLDER PATH   prints what is known of a model file
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from bench import common  # noqa: E402

ARGUMENTS = sys.argv[1:]
common.start_comfyui("cpu")

import types  # noqa: E402

package = types.ModuleType("hswq")
package.__path__ = [str(common.ROOT)]
sys.modules["hswq"] = package

import filelock  # noqa: E402
import folder_paths  # noqa: E402
import test_recording_store as tested  # noqa: E402
import torch  # noqa: E402
from hswq.calibration import load_statistics  # noqa: E402
from hswq.loader import store  # noqa: E402
from hswq.loader.files import fingerprints  # noqa: E402
from hswq.loader.host.folders import FOLDER  # noqa: E402

LOCKS: dict[Path, filelock.FileLock] = {}  # kept until the process has ended


def kill(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    chance, samples = random.Random(0), 0
    for _ in range(count):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            while True:
                tested.add()
                os.write(writing, b".")
        os.close(writing)
        os.read(reading, 1)  # it has begun
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = 1
        while found := os.read(reading, 1000):
            saved += len(found)
        os.close(reading)
        (path,) = folder.glob("*.pt")
        now = tested.samples_of(load_statistics(path))
        # The save that it had not told of may have been done or not.
        assert samples + saved <= now <= samples + saved + 1, (samples, saved, now)
        samples = now
    print(f"{count} kills, {samples} samples")


def end(lock: filelock.FileLock, how: str) -> None:
    logging.basicConfig()
    lock.acquire()
    store.add_soon(store.NewSums(tested.delta(), tested.FINGERPRINT, "recorded", "toy.safetensors"))
    if how == "free":
        lock.release()


def main(name: str, folder: str, what: str) -> None:
    folder_paths.folder_names_and_paths[FOLDER] = ([folder], {".pt"})
    if name == "known":
        print(fingerprints.known(what))
    elif name == "end":
        path = store.statistics_path(tested.FINGERPRINT, "recorded", "toy.safetensors")
        end(LOCKS.setdefault(path, filelock.FileLock(f"{path}.lock")), what)
    elif name == "kill":
        kill(Path(folder), int(what))
    else:
        for _ in range(int(what)):
            tested.add()


main(*ARGUMENTS)
