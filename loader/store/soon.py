"""Adding a sampling's sums without making it wait for a lock that another process holds."""

from __future__ import annotations

import atexit
import logging
import secrets

from ...calibration import Statistics, StatisticsError
from . import locked_file, waiting
from .sketches import write_held
from .statistics import add_statistics, statistics_path, sum_of
from .totals import RECORDING
from .waiting import NewSums

LAST_PATIENCE = 1.0
"""Seconds to wait for a lock when ComfyUI ends."""


def add_soon(new: NewSums) -> Statistics:
    """Add new sums as `add_statistics` does, and return what the file will hold.

    If another process holds the file's lock, the sums wait in memory until the next sampling of
    any model, or until ComfyUI ends.

    Raises:
        OSError, ValueError: as for `add_statistics`, but not for a lock.
    """
    # With an id now, so that the sums have the same one when they are added later.
    delta = Statistics(new.delta, {RECORDING: secrets.token_hex(8), **new.delta.meta})
    new = new._replace(delta=delta)
    for file in waiting.files():
        if file != new.file:
            _try_again(file, patience=0)
    before = waiting.take(new.file)
    if before is not None:
        new = new.after(before)
    try:
        return add_statistics(new, locked_file.SHORTLY)
    except locked_file.FileLockedError as error:
        logging.warning("HSWQ: what was recorded waits in memory: %s", error)
        return sum_of(_now_in_file(new), waiting.hold(new))


@atexit.register
def write_last() -> None:
    """Write all that waits in memory: sums first, because sketches need a statistics file."""
    add_waiting()
    write_held(patience=LAST_PATIENCE)


def add_waiting() -> None:
    """Add the sums that still wait. If their file is still locked, they are lost."""
    for file in waiting.files():
        _try_again(file, LAST_PATIENCE)
    for file in waiting.files():
        _report_lost(waiting.take(file), "another process holds the lock of its file")


def _try_again(file: tuple[str | None, str], patience: float) -> None:
    new = waiting.take(file)
    if new is None:
        return
    try:
        add_statistics(new, patience)
    except locked_file.FileLockedError:
        waiting.hold(new)
    except (OSError, ValueError) as error:
        _report_lost(new, error)


def _report_lost(new: NewSums, reason: object) -> None:
    images, name = new.delta.samples, new.model_name
    logging.warning("HSWQ: %d images recorded of %s are lost: %s", images, name, reason)


def _now_in_file(new: NewSums) -> Statistics | None:
    """Return the content of a file that another process has locked; None if it is unreadable."""
    try:
        return locked_file.read(statistics_path(new.fingerprint, new.session, new.model_name))
    except (OSError, StatisticsError):
        return None
