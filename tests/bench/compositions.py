"""Randomly composed samplings on the toy, each checked: weights, statistics, what is refused.

A seed that fails is printed with its composition; `--seeds 17-17` runs it alone.
"""

import collections
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

import common

chosen = common.arguments(
    __doc__, seeds={"default": "0-99", "help": "first and last seed, such as 0-999"}
)

import folder_paths  # noqa: E402
import torch  # noqa: E402
from harness.composed import Parts, check  # noqa: E402
from harness.compositions import compose  # noqa: E402
from harness.inprocess import load_16_bit  # noqa: E402
from hswq.loader.engine import loading  # noqa: E402
from hswq.loader.host.folders import register_folder  # noqa: E402
from hswq.loader.recording.recorder import recorder  # noqa: E402
from toy.checkpoint import make_checkpoint  # noqa: E402

torch.set_num_threads(1)  # the toy's layers are too small to share


def prepare(folder: str) -> Parts:
    """Record every layer into a folder; return what compositions are made of."""
    folder_paths.models_dir, folder_paths.user_directory = folder, folder
    settings = Path(folder, "default", "comfy.settings.json")
    settings.parent.mkdir()
    settings.write_text(json.dumps({"HSWQ.Budget": 100}))
    register_folder()
    recorder.install()
    checkpoint = Path(chosen.checkpoint)
    stock = load_16_bit(checkpoint)
    measured = common.made_up_statistics(stock)
    scaled, compatible = (
        loading.load_checkpoint(
            chosen.checkpoint, common.planner(measured, scaled=one), only_model=True
        )[0]
        for one in (True, False)
    )
    other = load_16_bit(make_checkpoint(Path(folder) / "other.safetensors", seed=1))
    return Parts(checkpoint, stock, scaled, compatible, other, measured)


def main() -> int:
    first, last = map(int, chosen.seeds.split("-"))
    failed, started = collections.Counter(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        parts = prepare(folder)
        for seed in range(first, last + 1):
            composition = compose(seed)
            try:
                check(composition, parts)
            except Exception as error:
                print(f"{seed}: {composition}", flush=True)
                print("".join(traceback.format_exception_only(error)[-1:]).strip(), flush=True)
                if not isinstance(error, AssertionError):
                    traceback.print_exc()
                failed[type(error).__name__] += 1
    seconds = time.perf_counter() - started
    count = last + 1 - first
    print(f"{count - failed.total()} of {count} are right, {seconds / count:.2f} s each")
    return min(1, failed.total())


sys.exit(main())
