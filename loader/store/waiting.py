"""Sums that wait in memory because another process holds the lock of their file."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ...calibration import Sketch, Statistics, merge_sketches


class NewSums(NamedTuple):
    """New sums, and where they belong.

    Attributes:
        delta: the sums.
        fingerprint: of the model's weights; None if its file is unknown.
        session: of the statistics file.
        model_name: of the model's file.
        order: names of the model's layers in its order, by which layers of equal sensitivity are
            chosen. Sums of other layers are dropped. Empty if it is unknown.
        sketches: of the layers' inputs, by layer name.
    """

    delta: Statistics
    fingerprint: str | None
    session: str
    model_name: str
    order: Collection[str] = ()
    sketches: Mapping[str, Sketch] | None = None

    def after(self, before: NewSums) -> NewSums:
        """Return earlier sums and these together.

        Raises:
            ValueError: a layer has different shapes in the two.
        """
        sketches = merge_sketches(before.sketches or {}, self.sketches or {})
        return self._replace(delta=before.delta.merge(self.delta), sketches=sketches)

    @property
    def file(self) -> tuple[str | None, str]:
        """A key for the statistics file: the model's fingerprint and the session."""
        return self.fingerprint, self.session


_waiting: dict[tuple[str | None, str], NewSums] = {}
_lock = threading.Lock()  # the panel and samplings run in different threads


def files() -> list[tuple[str | None, str]]:
    """Return the keys of the files for which sums wait."""
    return list(_waiting)


def hold(new: NewSums) -> NewSums:
    """Let sums wait; return them with those that wait for the same file already.

    Raises:
        ValueError: a layer has different shapes in the two.
    """
    with _lock:
        before = _waiting.get(new.file)
        if before is not None:
            new = new.after(before)
        _waiting[new.file] = new
        return new


def take(file: tuple[str | None, str]) -> NewSums | None:
    """Take the sums that wait for a file, and return them; None if there are none."""
    with _lock:
        return _waiting.pop(file, None)


def forget(fingerprint: str, session: str | None) -> None:
    """Drop what waits for one session of a model, or for all."""
    with _lock:
        for file in files():
            if file[0] == fingerprint and session in (None, file[1]):
                del _waiting[file]
