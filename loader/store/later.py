"""Work on a model's files that takes seconds, in a thread of its own: no sampling waits for it."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable

_threads: dict[str, threading.Thread] = {}
_lock = threading.Lock()
_ending = threading.Event()


class EndingError(Exception):
    """ComfyUI ends before the work is done."""


def do_later(fingerprint: str, work: Callable[[], None]) -> None:
    """Do some work for a model, unless such work is being done for it now.

    Args:
        fingerprint: of the model's weights.
        work: is done again another time if ComfyUI ends before its end. See `go_on`.
    """

    def run() -> None:
        try:
            with contextlib.suppress(EndingError):
                work()
        finally:
            with _lock:
                del _threads[fingerprint]

    with _lock:
        if fingerprint not in _threads and not _ending.is_set():
            thread = threading.Thread(target=run, name="hswq later", daemon=True)
            _threads[fingerprint] = thread
            thread.start()


def wait_for(fingerprint: str) -> None:
    """Wait for the work that is being done for a model, if any."""
    thread = _threads.get(fingerprint)
    if thread is not None and thread is not threading.current_thread():
        thread.join()


def go_on() -> None:
    """Work calls this between its parts.

    Raises:
        EndingError: it is done in a thread of this module, and ComfyUI ends.
    """
    if _ending.is_set() and threading.current_thread() in _threads.values():
        raise EndingError


@atexit.register
def end() -> None:
    """Wait for the parts that are being done: a thread that is cut off in torch aborts Python."""
    _ending.set()
    for fingerprint in list(_threads):
        wait_for(fingerprint)
