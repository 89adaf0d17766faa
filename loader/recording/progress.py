"""The progress of a sampling, in ComfyUI's steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from comfy_execution import progress

from .status import note_step

_NAME = "hswq.recording"


@contextmanager
def noted_steps() -> Iterator[None]:
    """Note each step of the sampling that runs in the block."""
    registry = progress.get_progress_state()
    registry.register_handler(_handler())
    try:
        yield
    finally:
        registry.unregister_handler(_NAME)


def _handler() -> progress.ProgressHandler:
    """Return a handler for the progress of the node that runs, which is the one that samples."""

    class Steps(progress.ProgressHandler):
        def update_handler(self, _: str, value: float, max_value: float, *more: object) -> None:
            note_step(int(value), int(max_value))

    return Steps(_NAME)
