"""Recording as a user's ComfyUI does it in the background, in a folder of its own."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import folder_paths
from _sampling import Latents, Sampler
from hswq.loader import store
from hswq.loader.host.folders import FOLDER
from hswq.loader.recording.recorder import Recorder
from hswq.loader.store.merge import gather

_FAR = 1_000_000  # seeds of recorded pictures are far from those of compared ones


@dataclasses.dataclass(frozen=True)
class Recording:
    """What is sampled while a model is recorded.

    Attributes:
        prompts: are taken in turn.
        sampler: makes the pictures.
        pictures: how many, on all machines together.
        machines: how many record a part each, to be merged.
    """

    prompts: Sequence[str]
    sampler: Sampler
    pictures: int
    machines: int = 1

    def parts(self, draw: int) -> list[Latents]:
        """Return what each machine samples; each draw has its own seeds and order of prompts."""
        first = draw * self.pictures
        numbers = range(first, first + self.pictures)
        parts = [numbers[machine :: self.machines] for machine in range(self.machines)]
        return [
            Latents(
                [self.prompts[number % len(self.prompts)] for number in part],
                [_FAR + number for number in part],
            )
            for part in parts
        ]


@contextmanager
def recorded(patcher, recording: Recording, draw: int = 0) -> Iterator[None]:
    """Record a 16-bit model; in the block, "auto" means what was recorded.

    Statistics, sketches and settings are those of an installation that has just begun.
    """
    before = folder_paths.folder_names_and_paths.get(FOLDER), folder_paths.user_directory
    with tempfile.TemporaryDirectory() as base:
        folder_paths.user_directory = str(Path(base, "user"))
        try:
            machines = []
            for number, wanted in enumerate(recording.parts(draw)):
                machines.append(_use(Path(base, f"machine{number}")))
                _sample(patcher, recording.sampler, wanted)
            if len(machines) > 1:
                _merge(machines, _use(Path(base, "merged")))
            yield
        finally:
            folder_paths.user_directory = before[1]
            _use(None, before[0])


def _use(folder: Path | None, registered: tuple | None = None) -> Path | None:
    """Make a folder the one for statistics, or register again what was before."""
    known = folder_paths.folder_names_and_paths
    known.pop(FOLDER, None)
    if folder is not None:
        folder.mkdir(parents=True)
        known[FOLDER] = [str(folder)], {".pt"}
    elif registered is not None:
        known[FOLDER] = registered
    folder_paths.filename_list_cache.pop(FOLDER, None)
    return folder


def _sample(patcher, sampler: Sampler, wanted: Latents) -> None:
    recorder = Recorder()
    recorder.install()
    try:
        sampler.sample(patcher, wanted)
    finally:
        recorder.remove()
    store.write_held()


def _merge(machines: list[Path], central: Path) -> None:
    """Merge machines' files as HSWQ Merge Statistics does; a subfolder's alone count as merged."""
    for machine in machines:
        shutil.copytree(machine, central / "farm" / machine.name)
    gather("farm", "merged")
