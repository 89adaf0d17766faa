"""Telling listeners that something has changed that a user may see."""

from __future__ import annotations

from collections.abc import Callable

_listeners: list[Callable[[], None]] = []
_of_progress: list[Callable[[], None]] = []


def on_change(listener: Callable[[], None]) -> None:
    """Call a function whenever something changes that a user may see, except a sampling's step.

    It is called from any thread, also by the garbage collector: it must not wait, and not raise.
    """
    _listeners.append(listener)


def changed() -> None:
    """Tell the listeners: recording, statistics, search results or loaded models have changed."""
    for listener in _listeners:
        listener()


def on_progress(listener: Callable[[], None]) -> None:
    """Call a function whenever a recorded sampling has done a step. As for on_change."""
    _of_progress.append(listener)


def progressed() -> None:
    """Tell the listeners that a sampling has done a step."""
    for listener in _of_progress:
        listener()
