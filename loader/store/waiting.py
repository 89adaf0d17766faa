"""What was recorded while another process kept the file locked: it waits in memory."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ...calibration import Sketch, Statistics, merge_sketches


class New(NamedTuple):
    """New sums, and where they belong.

    Attributes:
        delta: the sums.
        fingerprint: of the model's weights, None if its file is unknown.
        session: of the statistics file.
        model_name: of the model's file.
        order: the model's layers as they come in it; empty where that is unknown.
        sketches: of the sampling's inputs, by layer.
    """

    delta: Statistics
    fingerprint: str | None
    session: str
    model_name: str
    order: Collection[str] = ()
    sketches: Mapping[str, Sketch] | None = None

    def after(self, before: New) -> New:
        """Return both together.

        Raises:
            ValueError: their layers have other shapes.
        """
        sketches = merge_sketches(before.sketches or {}, self.sketches or {})
        return self._replace(delta=before.delta.merge(self.delta), sketches=sketches)

    @property
    def file(self) -> tuple[str | None, str]:
        """What tells its statistics file from others."""
        return self.fingerprint, self.session


_waiting: dict[tuple[str | None, str], New] = {}
_lock = threading.Lock()  # the panel forgets a model in another thread than the one that samples


def files() -> list[tuple[str | None, str]]:
    """Return whose sums are waiting."""
    return list(_waiting)


def hold(new: New) -> New:
    """Let sums wait, with those that wait for the same file; return both together.

    Raises:
        ValueError: their layers have other shapes than those.
    """
    with _lock:
        before = _waiting.get(new.file)
        if before is not None:
            new = new.after(before)
        _waiting[new.file] = new
        return new


def take(file: tuple[str | None, str]) -> New | None:
    """Return the sums that wait for a file, which wait no more; None where there are none."""
    with _lock:
        return _waiting.pop(file, None)


def forget(fingerprint: str, session: str | None) -> None:
    """Drop what waits for one session of a model, or for all."""
    with _lock:
        for file in files():
            if file[0] == fingerprint and session in (None, file[1]):
                del _waiting[file]
