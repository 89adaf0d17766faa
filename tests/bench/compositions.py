"""Randomly composed samplings on the toy, each checked: weights, statistics, what is refused.

A seed that fails is printed with its composition; `--seeds 17-17` runs it alone. With `--results`
a run may be stopped: the next one leaves out the seeds that the file has.
"""

import collections
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import common

chosen = common.arguments(
    __doc__,
    seeds={"default": "0-99", "help": "such as 0-999, or 17,40-45"},
    part={"default": "0/1", "help": "of all processes that share the seeds: number and count"},
    processes={"type": int, "default": 1, "help": "share the seeds among so many"},
    results={"type": Path, "help": "file to add a line for each seed to"},
    seconds={"type": float, "default": float("inf"), "help": "begin no seed after so many"},
)

import comfy.model_management  # noqa: E402
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
started = time.perf_counter()


def prepare(folder: str) -> Parts:
    """Record every layer into a folder; return what compositions are made of."""
    folder_paths.models_dir, folder_paths.user_directory = folder, folder
    settings = Path(folder, "default", "comfy.settings.json")
    settings.parent.mkdir()
    settings.write_text(json.dumps({"HSWQ.Budget": 100}))
    register_folder()
    recorder.install()
    if chosen.dynamic:  # our models too, though they fit without
        loading.make_room = lambda *_: False
    # A file of its own: other processes write the benchmarks' one.
    checkpoint = make_checkpoint(Path(folder) / "toy.safetensors")
    stock = load_16_bit(checkpoint)
    measured = common.made_up_statistics(stock)
    scaled, compatible = (
        loading.load_checkpoint(
            str(checkpoint), common.planner(measured, mode=one), only_model=True
        )[0]
        for one in ("scaled", "compatible")
    )
    other = load_16_bit(make_checkpoint(Path(folder) / "other.safetensors", seed=1))
    return Parts(checkpoint, stock, scaled, compatible, other, measured)


def seeds() -> list[int]:
    """Return those that are left for this process to do."""
    wanted = []
    for part in chosen.seeds.split(","):
        first, _, last = part.partition("-")
        wanted += range(int(first), int(last or first) + 1)
    number, count = map(int, chosen.part.split("/"))
    lines = chosen.results.read_text() if chosen.results and chosen.results.exists() else ""
    done = {int(line.split(":")[0]) for line in lines.splitlines()}
    return [seed for seed in wanted[number::count] if seed not in done]


def error_of(seed: int, parts: Parts) -> Exception | None:
    """Run one composition; return what is wrong with it."""
    composition = compose(seed, dynamic=chosen.dynamic)
    try:
        check(composition, parts)
    except Exception as error:
        print(f"{seed}: {composition}", flush=True)
        print("".join(traceback.format_exception_only(error)[-1:]).strip(), flush=True)
        if not isinstance(error, AssertionError):
            traceback.print_exc()
        return error
    return None


def share() -> int:
    """Let other processes do the seeds; return how many of them failed."""
    words = [sys.executable, __file__, *sys.argv[1:], "--processes", "1", "--part"]
    count = chosen.processes
    parts = [subprocess.Popen([*words, f"{number}/{count}"]) for number in range(count)]
    return sum(one.wait() != 0 for one in parts)


def main() -> int:
    if chosen.processes > 1:
        return min(1, share())
    failed, count = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        parts, ready = prepare(folder), time.perf_counter()
        for seed in seeds():
            if time.perf_counter() - started > chosen.seconds:
                break
            error, count = error_of(seed, parts), count + 1
            failed.update([type(error).__name__] if error else [])
            if chosen.results:
                with chosen.results.open("a") as file:
                    file.write(f"{seed}: {'right' if error is None else repr(error)}\n")
        comfy.model_management.unload_all_models()
    each = (time.perf_counter() - ready) / max(1, count)
    print(f"{count - failed.total()} of {count} are right, {each:.2f} s each")
    return min(1, failed.total())


sys.exit(main())
